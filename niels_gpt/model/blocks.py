"""The parts of the model.

Shapes: B batch, T positions, C model width, H heads, D = C/H head width. Activations float32.

Dropout acts once on each residual branch, on the embedding, and on the attention probabilities.
Its randomness comes either from the keys in `drop` (see `niels_gpt.model.dropout`) or, with
`drop=None` and in `train()` mode, from torch's global generator as in any module.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from niels_gpt.config import ModelConfig
from niels_gpt.model import dropout, rope

STD = 0.02  # of the first weights
Q_BLOCK = 64  # queries per block: later keys are skipped, about half of all scores


def init_weights(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Initialise weights N(0, 0.02), biases 0, LayerNorm 1 and 0 (Radford et al. 2019, GPT-2).

    Deviation from GPT-2: projections into the residual stream are not scaled by 1/sqrt(2L).
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, mean=0.0, std=STD, generator=generator)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class CausalSelfAttention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.H, self.p, self.theta = cfg.H, cfg.dropout, cfg.rope_theta
        self.qkv = nn.Linear(cfg.C, 3 * cfg.C, bias=False)
        self.proj = nn.Linear(cfg.C, cfg.C, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        return_attn: bool = False,
        drop: Tensor | None = None,
        tables: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Map (B, T, C) to (B, T, C).

        Args:
            x: (B, T, C).
            return_attn: also return the (B, H, T, T) probabilities, before dropout.
            drop: (B, 2) int32 keys of the probabilities' mask.
            tables: sin and cos of x's positions from `rope_cache`; computed if not given.
        """
        T, C = x.shape[-2:]
        if tables is None:
            tables = rope.rope_cache(
                T, C // self.H, theta=self.theta, device=x.device, dtype=x.dtype
            )
        attn: list[Tensor] | None = [] if return_attn else None
        y = self._attend(*self._rotated(x, tables), drop=drop, attn=attn)
        if attn is None:
            return y
        return y, torch.cat([F.pad(p, (0, T - p.shape[-1])) for p in attn], dim=-2)

    def _rotated(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries and keys, and values, each (B, H, T, D)."""
        q, k, v = (
            part.unflatten(-1, (self.H, -1)).transpose(-3, -2).contiguous()
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        return *rope.apply_rope(q, k, *tables), v

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        drop: Tensor | None = None,
        attn: list[Tensor] | None = None,
    ) -> Tensor:
        """Let the query of each position attend to all keys up to it; return (B, T, C).

        Appends the probabilities of each block of queries to `attn`.
        """
        T, D = q.shape[-2:]
        queries = (q * D**-0.5).split(Q_BLOCK, dim=-2)
        stops = tuple(min(stop, T) for stop in range(Q_BLOCK, T + Q_BLOCK, Q_BLOCK))
        rows: list[Tensor] = []
        first = 0
        for q, seen_k, seen_v in zip(queries, prefixes(k, stops), prefixes(v, stops), strict=True):
            p = _causal_softmax(q, seen_k)  # (B, H, block, seen)
            if attn is not None:
                attn.append(p)
            rows.append(drop_out(p, drop, self.p, self.training, first) @ seen_v)
            first += p[0].numel()
        y: Tensor = self.proj(torch.cat(rows, dim=-2).transpose(-3, -2).flatten(-2))
        return y


def drop_out(x: Tensor, key: Tensor | None, p: float, training: bool, start: int = 0) -> Tensor:
    """Drop activations (B, ...) by their keys (B, 2), or else as `F.dropout` does."""
    if key is not None and p:
        return dropout.dropout(x, key, p, start=start)
    return F.dropout(x, p) if training else x


def _causal_softmax(q: Tensor, k: Tensor) -> Tensor:
    """Return the attention probabilities of the last n queries over the m keys up to each.

    q is (B, H, n, D), already scaled, k is (B, H, m, D); returns (B, H, n, m).
    """
    n, m = q.shape[-2], k.shape[-2]
    future = torch.full((n, n), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    bias = F.pad(future, (m - n, 0))  # (n, m)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT)
    return scores.softmax(-1).reshape(*q.shape[:2], n, m)


class _Prefixes(torch.autograd.Function):
    """See `prefixes`. Linear, so that its tangents are prefixes too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, stops: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(x[..., :stop, :] for stop in stops)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.stops = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[-1].clone()  # the last prefix is all of x
        for grad in grads[:-1]:
            total[..., : grad.shape[-2], :].add_(grad)
        return total, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, ...]:
        return tuple(tangent[..., :stop, :] for stop in ctx.stops)


def prefixes(x: Tensor, stops: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return the first positions of x (..., T, D) up to each stop, the last of which is T.

    Each gradient of a plain slice would be padded to all of x with zeros before summing. A compiler
    avoids that itself, and does not support functions with a custom jvp.
    """
    if len(stops) == 1 or torch.compiler.is_compiling():
        return tuple(x[..., :stop, :] for stop in stops)
    parts: tuple[Tensor, ...] = _Prefixes.apply(x, stops)  # type: ignore[no-untyped-call]
    return parts


class MLP(nn.Module):
    """Two linear maps around an exact GELU."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(cfg.C, cfg.d_ff)
        self.fc2 = nn.Linear(cfg.d_ff, cfg.C)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class Block(nn.Module):
    """One pre-norm block: `x + drop(attn(ln1(x)))`, then `x + drop(mlp(ln2(x)))`."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.p = cfg.dropout
        self.ln1 = nn.LayerNorm(cfg.C, eps=1e-5)
        self.attn = CausalSelfAttention(cfg)
        self.ln2 = nn.LayerNorm(cfg.C, eps=1e-5)
        self.mlp = MLP(cfg)

    def forward(
        self,
        x: Tensor,
        *,
        return_attn: bool = False,
        drop: Tensor | None = None,
        tables: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Map (B, T, C) to (B, T, C); with `return_attn` also return the attention's probabilities.

        `drop` (B, 3, 2) keys attention, its branch, the MLP's; `tables` are for the attention.
        """
        keys = (None, None, None) if drop is None else drop.unbind(1)
        a = self.attn(self.ln1(x), return_attn=return_attn, drop=keys[0], tables=tables)
        if return_attn:
            return self._residual(x, a[0], keys[1:]), a[1]
        return self._residual(x, a, keys[1:])

    def _residual(
        self, x: Tensor, a: Tensor, keys: Sequence[Tensor | None] = (None, None)
    ) -> Tensor:
        """Add the attention's branch a, then the MLP's."""
        x = x + drop_out(a, keys[0], self.p, self.training)
        return x + drop_out(self.mlp(self.ln2(x)), keys[1], self.p, self.training)
