"""The model once more, as plain formulas on a dict of weights, with torch's fused attention.

It shares no code with the package but `keep_mask` and `keep_rate`, which the masked variant takes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from niels_gpt import ModelConfig
from niels_gpt.model.dropout import keep_mask, keep_rate


def turn(x: Tensor, theta: float) -> Tensor:
    """Turn neighbour pairs of x (B, H, T, D), as complex numbers."""
    T, D = x.shape[-2:]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    angle = torch.tensor([[pos * theta ** (-2 * i / D) for i in range(D // 2)] for pos in range(T)])
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def attention(x: Tensor, qkv: Tensor, proj: Tensor, cfg: ModelConfig) -> Tensor:
    """Map x (B, T, C) with weights qkv (3C, C) and proj (C, C)."""
    q, k, v = (
        part.unflatten(-1, (cfg.H, -1)).transpose(1, 2) for part in (x @ qkv.T).split(cfg.C, -1)
    )
    q, k = turn(q, cfg.rope_theta), turn(k, cfg.rope_theta)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).flatten(2) @ proj.T


def masked_attention(x: Tensor, qkv: Tensor, proj: Tensor, cfg: ModelConfig, key: Tensor) -> Tensor:
    """Like `attention`, with the probabilities dropped under one key (B, 2)."""
    T = x.shape[1]
    q, k, v = (
        part.unflatten(-1, (cfg.H, -1)).transpose(1, 2) for part in (x @ qkv.T).split(cfg.C, -1)
    )
    scores = turn(q, cfg.rope_theta) @ turn(k, cfg.rope_theta).mT / math.sqrt(cfg.C / cfg.H)
    probabilities = (scores + torch.full((T, T), -math.inf).triu(1)).softmax(-1)
    y = dropped(probabilities, key, cfg.dropout) @ v
    return y.transpose(1, 2).flatten(2) @ proj.T


def dropped(x: Tensor, key: Tensor, p: float) -> Tensor:
    return x * keep_mask(key, tuple(x.shape[1:]), p) / keep_rate(p)


def logits(
    params: dict[str, Tensor], x: Tensor, cfg: ModelConfig, drop: Tensor | None = None
) -> Tensor:
    """Map ids x (B, T) to (B, T, V); with keys `drop` (B, S, 2), T up to one block of queries."""

    def norm(h: Tensor, name: str) -> Tensor:
        return F.layer_norm(h, (cfg.C,), params[f"{name}.weight"], params[f"{name}.bias"])

    def maybe_dropped(h: Tensor, site: int) -> Tensor:
        return h if drop is None else dropped(h, drop[:, site], cfg.dropout)

    h = maybe_dropped(params["tok_emb.weight"][x], 0)
    for i in range(cfg.L):
        p = {n.removeprefix(f"blocks.{i}."): w for n, w in params.items() if f"blocks.{i}." in n}
        normed, weights = norm(h, f"blocks.{i}.ln1"), (p["attn.qkv.weight"], p["attn.proj.weight"])
        a = (
            attention(normed, *weights, cfg)
            if drop is None
            else masked_attention(normed, *weights, cfg, drop[:, 1 + 3 * i])
        )
        h = h + maybe_dropped(a, 2 + 3 * i)
        u = norm(h, f"blocks.{i}.ln2") @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
        gelu = u * (1 + torch.erf(u / math.sqrt(2))) / 2
        h = h + maybe_dropped(gelu @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"], 3 + 3 * i)
    return norm(h, "ln_f") @ params["tok_emb.weight"].T
