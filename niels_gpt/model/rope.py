"""Rotary position embedding (Su et al. 2021, RoFormer, arXiv 2104.09864, eq. 34).

Shapes: B batch, H heads, T positions, D head width (even). Pairs are the neighbours
(0, 1), (2, 3), ... of the last axis, as in the paper; many later models pair i with i + D/2.
"""

import torch
from torch import Tensor


def rope_cache(
    T: int,
    D: int,
    *,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Tabulate sin and cos of `angle[pos, i] = pos * theta ** (-2i/D)`, each (1, 1, T, D//2).

    Angles are computed in float32 and cast to `dtype`; only float64 tables are computed in
    float64, which MPS lacks.

    Raises:
        ValueError: if D is odd.
    """
    if D % 2:
        raise ValueError(f"D must be even, because rotary embedding pairs neighbours, got D={D}")
    dtype = dtype or torch.float32
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    inv_freq = torch.tensor(
        [theta ** (-2 * i / D) for i in range(D // 2)], dtype=exact, device=device
    )
    pos = torch.arange(T, dtype=exact, device=device)
    angle = pos[:, None] * inv_freq  # (T, D//2)
    return angle.sin().to(dtype)[None, None], angle.cos().to(dtype)[None, None]


def apply_rope(q: Tensor, k: Tensor, sin: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate each neighbour pair (a, b) to (a cos - b sin, a sin + b cos).

    Args:
        q, k: (B, H, Tq, D).
        sin, cos: (1, 1, T, D//2) with T >= Tq; the first Tq rows are used.

    Raises:
        ValueError: on any mismatch of shape, dtype or device. Nothing is cast silently.
    """
    _check(q, k, sin, cos)
    Tq = q.shape[-2]
    sin, cos, turn = expand(sin[..., :Tq, :], cos[..., :Tq, :])
    return rotate(q, sin, cos, turn), rotate(k, sin, cos, turn)


def expand(sin: Tensor, cos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Prepare tables (..., D//2) for `rotate`: repeat each angle for its pair; also return `turn`.

    Returns sin and cos, each (..., D), and the matrix (D, D) that maps each pair (a, b) to (-b, a).
    """
    both, turn = _pair_matrices(2 * sin.shape[-1], sin)
    return _product(sin, both), _product(cos, both), turn


def rotate(x: Tensor, sin: Tensor, cos: Tensor, turn: Tensor) -> Tensor:
    """Rotate the pairs of x (..., D) by what `expand` returns, without checks.

    This is linear in x: at one position, the rotated identity is the matrix of the rotation.
    """
    return torch.addcmul(x * cos, _product(x, turn), sin)


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply x (..., n) by a matrix (n, m), as one product of two matrices.

    A batched product repeats the matrix by a stride of 0, which some versions of macOS misread.
    """
    return torch.mm(x.flatten(0, -2), matrix).view(*x.shape[:-1], matrix.shape[1])


def _pair_matrices(D: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrices that repeat each angle for its pair, (D/2, D), and turn pairs, (D, D).

    The turn maps each pair (a, b) to (-b, a). Products with zeros and ones are exact, because each
    sum has one term, and faster than strided reads and writes.
    """
    even, odd = torch.eye(D, dtype=like.dtype, device=like.device).view(D // 2, 2, D).unbind(1)
    return even + odd, torch.stack((odd, -even), dim=1).view(D, D)


def _check(q: Tensor, k: Tensor, sin: Tensor, cos: Tensor) -> None:
    if q.ndim != 4 or q.shape != k.shape:
        raise ValueError(f"q and k must both be (B, H, T, D), got {_shape(q)} and {_shape(k)}")
    Tq, D = q.shape[-2:]
    if D % 2:
        raise ValueError(f"head width must be even, got D={D}")
    if sin.shape != cos.shape or sin.ndim != 4 or sin.shape[:2] != (1, 1):
        raise ValueError(f"sin and cos must be (1, 1, T, D//2), got {_shape(sin)}, {_shape(cos)}")
    if sin.shape[-1] != D // 2 or sin.shape[-2] < Tq:
        raise ValueError(f"tables {_shape(sin)} do not cover positions {Tq} and head width {D}")
    if len({t.dtype for t in (q, k, sin, cos)}) > 1:
        raise ValueError(f"dtypes differ: {[t.dtype for t in (q, k, sin, cos)]}")
    if len({t.device for t in (q, k, sin, cos)}) > 1:
        raise ValueError(f"devices differ: {[t.device for t in (q, k, sin, cos)]}")


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)
