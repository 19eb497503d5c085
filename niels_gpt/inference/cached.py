"""The model's forward pass for bytes that come one by one, with cached keys and values.

The mathematics is that of `niels_gpt.model` without dropout and gradients, in fewer operations: for
one byte, starting an operation costs more than the operation. Only the logits after the last byte
are computed. The tests prove both equal, up to float32 rounding.

Shapes: B texts, n bytes read at once, t bytes seen, T context, C width, H heads, D = C/H, V values.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from niels_gpt.config import ModelConfig
from niels_gpt.model import rope

EPS = 1e-5  # of every LayerNorm


class BlockWeights(NamedTuple):
    """The parameters of one block; matrices are transposed views, (inputs, outputs)."""

    ln1: tuple[Tensor, Tensor]  # weight and bias
    qkv: Tensor
    proj: Tensor
    ln2: tuple[Tensor, Tensor]
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor


class Weights(NamedTuple):
    """The parameters of a model, not copied, with the tables that every byte needs."""

    cfg: ModelConfig
    tok_emb: Tensor  # (V, C)
    blocks: tuple[BlockWeights, ...]
    ln_f: tuple[Tensor, Tensor]
    rotation: tuple[Tensor, Tensor, Tensor]  # sin and cos, each (T, D), and turn; see rope.expand
    eye: Tensor  # (D, D)


class Cache:
    """The bytes of B texts with their rotated keys and values, of which only more are written.

    `filled` positions are written, and none of them is written again. Who wants to continue an
    earlier state otherwise takes a `fork`.
    """

    def __init__(self, ids: Tensor, kv: Tensor, filled: int) -> None:
        self.ids = ids  # (B, T) int64
        self.kv = kv  # (L, 2, B, H, T, D): keys, then values
        self.filled = filled

    def fork(self, t: int, copies: int = 1) -> "Cache":
        """Copy the first t positions, all texts `copies` times."""
        B, T = self.ids.shape
        L, _, _, H, _, D = self.kv.shape
        new = Cache(
            self.ids.new_empty(B * copies, T), self.kv.new_empty(L, 2, B * copies, H, T, D), t
        )
        new.ids.view(copies, B, T)[..., :t] = self.ids[:, :t]
        new.kv.view(L, 2, copies, B, H, T, D)[..., :t, :] = self.kv[:, :, None, :, :, :t]
        return new


def bind(params: Mapping[str, Tensor], cfg: ModelConfig) -> Weights:
    """Prepare the parameters of a model for reading."""

    def norm(name: str) -> tuple[Tensor, Tensor]:
        return params[f"{name}.weight"], params[f"{name}.bias"]

    def block(name: str) -> BlockWeights:
        return BlockWeights(
            norm(f"{name}.ln1"),
            params[f"{name}.attn.qkv.weight"].t(),
            params[f"{name}.attn.proj.weight"].t(),
            norm(f"{name}.ln2"),
            params[f"{name}.mlp.fc1.weight"].t(),
            params[f"{name}.mlp.fc1.bias"],
            params[f"{name}.mlp.fc2.weight"].t(),
            params[f"{name}.mlp.fc2.bias"],
        )

    table = params["tok_emb.weight"]
    D, device, dtype = cfg.C // cfg.H, table.device, table.dtype
    sin, cos = rope.rope_cache(cfg.T, D, theta=cfg.rope_theta, device=device, dtype=dtype)
    return Weights(
        cfg,
        table,
        tuple(block(f"blocks.{i}") for i in range(cfg.L)),
        norm("ln_f"),
        rope.expand(sin[0, 0], cos[0, 0]),
        torch.eye(D, device=device, dtype=dtype),
    )


def empty_cache(weights: Weights, B: int) -> Cache:
    """Return a cache for B texts of up to T bytes."""
    cfg, table = weights.cfg, weights.tok_emb
    shape = (cfg.L, 2, B, cfg.H, cfg.T, cfg.C // cfg.H)
    return Cache(table.new_empty(B, cfg.T, dtype=torch.int64), table.new_empty(shape), 0)


def read_first(weights: Weights, ids: Tensor, cache: Cache, rows: slice) -> Tensor:
    """Read the first bytes (rows, n) of some texts into the cache; return logits (rows, V)."""
    B, n = ids.shape
    H, (sin, cos, turn) = weights.cfg.H, weights.rotation
    cache.ids[rows, :n] = ids
    x = F.embedding(ids, weights.tok_emb).flatten(0, 1)  # (B n, C)
    for block, stored in zip(weights.blocks, cache.kv[:, :, rows, :, :n].unbind(0), strict=True):
        qkv = _normed(x, block.ln1) @ block.qkv
        q, k, v = qkv.view(B, n, 3, H, -1).permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        q, k = rope.rotate(q, sin[:n], cos[:n], turn), rope.rotate(k, sin[:n], cos[:n], turn)
        stored[0].copy_(k)
        stored[1].copy_(v)
        if block is weights.blocks[-1]:  # only its last row is read
            x = x.view(B, n, -1)[:, -1]
            y = _attend(q[:, :, -1:].flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).view(B, -1)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            y = y.transpose(1, 2).reshape(B * n, -1)
        x = _residual(x, y, block)
    return _logits(weights, x)


def read_next(weights: Weights, ids: Tensor, cache: Cache, t: int) -> Tensor:
    """Read one more byte (B,) of every text, after t others; return logits (B, V)."""
    B, H, D = len(ids), weights.cfg.H, len(weights.eye)
    cache.ids[:, t] = ids
    sin, cos, turn = weights.rotation
    rotation = rope.rotate(weights.eye, sin[t], cos[t], turn)  # (D, D)
    stored = cache.kv.select(-2, t).flatten(0, 1).unbind(0)  # 2 L times (B, H, D)
    seen = cache.kv.narrow(-2, 0, t + 1).flatten(0, 1).flatten(1, 2).unbind(0)  # (B H, t + 1, D)
    x = F.embedding(ids, weights.tok_emb)  # (B, C)
    for i, block in enumerate(weights.blocks):
        qkv = torch.mm(_normed(x, block.ln1), block.qkv)
        q, k, _ = torch.mm(qkv.view(-1, D), rotation).view(B, 3, H, D).unbind(1)
        v = qkv.view(B, 3, H, D).select(1, 2)
        stored[2 * i].copy_(k)
        stored[2 * i + 1].copy_(v)
        y = _attend(q.reshape(-1, 1, D), seen[2 * i], seen[2 * i + 1]).view(B, -1)
        x = _residual(x, y, block)
    return _logits(weights, x)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let one query each (B H, 1, D) attend to its keys (B H, t, D); return (B H, 1, D)."""
    scores = torch.baddbmm(q.new_zeros(()), k, q.mT, beta=0, alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.mT.softmax(-1), v)


def _residual(x: Tensor, y: Tensor, block: BlockWeights) -> Tensor:
    """Add to x the projection of the attention's rows y, then the MLP's branch."""
    x = torch.addmm(x, y, block.proj)
    hidden = F.gelu(torch.addmm(block.fc1_bias, _normed(x, block.ln2), block.fc1))
    return torch.addmm(x, hidden, block.fc2).add_(block.fc2_bias)


def _normed(x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
    return torch.layer_norm(x, x.shape[-1:], *norm, EPS)


def _logits(weights: Weights, x: Tensor) -> Tensor:
    return torch.mm(_normed(x, weights.ln_f), weights.tok_emb.t())
