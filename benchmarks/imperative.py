"""The reference: the same model and update as a plain, idiomatic PyTorch loop.

It shares only the config with the trainer, and is meant to be as fast as such a loop gets
without tricks: fused attention and optimizer, precomputed rotary tables, no extra copies. Parameter
names are those of `niels_gpt.model.GPT`, so weights can be copied across with `load_state_dict`.

Shapes: B batch, T context, C width, H heads, D = C/H head width, V = 256 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from niels_gpt.config import ModelConfig, TrainConfig


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dropout = cfg.H, cfg.dropout
        self.qkv = nn.Linear(cfg.C, 3 * cfg.C, bias=False)
        self.proj = nn.Linear(cfg.C, cfg.C, bias=False)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        q, k = rotate(q, sin, cos), rotate(k, sin, cos)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y: Tensor = self.proj(out.transpose(1, 2).reshape(B, T, C))
        return y


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(cfg.C, cfg.d_ff)
        self.fc2 = nn.Linear(cfg.d_ff, cfg.C)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(cfg.C), Attention(cfg)
        self.ln2, self.mlp = nn.LayerNorm(cfg.C), MLP(cfg)
        self.dropout = cfg.dropout

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        x = x + F.dropout(self.attn(self.ln1(x), sin, cos), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.ln2(x)), self.dropout, self.training)


class ImperativeGPT(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.dropout = cfg.dropout
        self.tok_emb = nn.Embedding(cfg.V, cfg.C)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.L))
        self.ln_f = nn.LayerNorm(cfg.C)
        self.lm_head = nn.Linear(cfg.C, cfg.V, bias=False)
        self.lm_head.weight = self.tok_emb.weight
        sin, cos = rotary_tables(cfg.T, cfg.C // cfg.H, cfg.rope_theta)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("cos", cos, persistent=False)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        sin, cos = self.get_buffer("sin")[:T], self.get_buffer("cos")[:T]
        h = F.dropout(self.tok_emb(x), self.dropout, self.training)  # (B, T, C)
        for block in self.blocks:
            h = block(h, sin, cos)
        logits: Tensor = self.lm_head(self.ln_f(h))
        return logits


def rotary_tables(T: int, D: int, theta: float) -> tuple[Tensor, Tensor]:
    """Sine and cosine of position * theta^(-2i/D), each (T, D/2)."""
    inv_freq = theta ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)
    angle = torch.outer(torch.arange(T, dtype=torch.float32), inv_freq)
    return angle.sin(), angle.cos()


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(),
        lr=cfg.base_lr,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=cfg.weight_decay,
        fused=True,
    )


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean nats per byte."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def imperative_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    *,
    lr: float,
    grad_clip: float,
) -> Tensor:
    """Update `model` and `optimizer` in place; return the loss before the update."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss = cross_entropy(model, x, y)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    return loss.detach()
