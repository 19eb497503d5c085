"""Dropout whose masks are a pure function of (seed, step, row, site).

A mask bit is a hash of a counter under a key, in the manner of Salmon et al. 2011 ("Parallel
random numbers: as easy as 1, 2, 3"). There is no generator and no state, so the same masks come
out on every device, for every number of threads, in one pass or row by row, under `vmap` and
inside a compiled graph.

Shapes: B rows, S sites (places in the model where dropout acts), two 32-bit key words each.
All words are int32 with wrapping arithmetic: MPS has no unsigned 32-bit integers.
"""

import math

import torch
from torch import Tensor

from niels_gpt.rng import derive_seed

LANE = 1 << 16  # each 32-bit word gives two independent 16-bit draws


def sites(L: int) -> int:
    """Count the sites of a model of L blocks: the embedding, and three in each block."""
    return 1 + 3 * L


def dropout_keys(seed: int, step: int, rows: range | Tensor, n_sites: int) -> Tensor:
    """Derive the keys of one step's masks: (len(rows), n_sites, 2) int32, on the CPU.

    `rows` are positions in the whole batch. A step that is split by rows, into blocks or over
    processes, slices these keys (or asks for its own rows) and draws the masks of the whole.
    """
    root = derive_seed(seed, "dropout", step)
    row = torch.as_tensor(rows, dtype=torch.int32)[:, None]
    site = torch.arange(n_sites, dtype=torch.int32)
    words = [
        _mix(_mix(row + _int32(half), _int32(half >> 7)) + site, _int32(half >> 13))
        for half in (root & 0xFFFFFFFF, root >> 32)
    ]
    return torch.stack(words, dim=-1)


def keep_rate(p: float) -> float:
    """Return the exact probability of keeping an element: 1 - p in steps of 2**-16, not 0."""
    return 1.0 - _dropped(p) / LANE


def keep_mask(key: Tensor, shape: tuple[int, ...], p: float, *, start: int = 0) -> Tensor:
    """Draw the mask of one site: (B, *shape) bool, True with probability `keep_rate(p)`.

    Args:
        key: (B, 2) int32, one column of `dropout_keys`.
        shape: of one row's activations.
        p: probability of dropping an element, in [0, 1).
        start: the first counter, for a site whose mask is drawn in several pieces.
    """
    n = math.prod(shape)
    first = torch.arange(start, start + (n + 1) // 2, dtype=torch.int32, device=key.device)
    word = _mix(first ^ key[:, :1], key[:, 1:])  # (B, n/2)
    bar = _dropped(p) * LANE - (1 << 31)
    lanes = torch.cat((word >= bar, (word << 16) >= bar), dim=1)
    return lanes[:, :n].reshape(-1, *shape)


def dropout(x: Tensor, key: Tensor, p: float, *, start: int = 0) -> Tensor:
    """Zero the dropped elements of x (B, ...) and scale the rest by 1 / keep_rate(p)."""
    return x * keep_mask(key, tuple(x.shape[1:]), p, start=start) * (1.0 / keep_rate(p))


def _dropped(p: float) -> int:
    """Count the values of a 16-bit draw that drop an element: at least one keeps it."""
    return min(round(p * LANE), LANE - 1)


def _mix(word: Tensor, key: Tensor | int) -> Tensor:
    """Hash int32 words: C. Wellons' `lowbias32` finalizer with a key between its two rounds.

    Adding the key only at the front would give every key the same words in another order.
    """
    word = (word ^ ((word >> 16) & 0xFFFF)) * 0x7FEB352D
    word = word ^ key
    word = (word ^ ((word >> 15) & 0x1FFFF)) * _int32(0x846CA68B)
    return word ^ ((word >> 16) & 0xFFFF)


def _int32(word: int) -> int:
    """Read the low 32 bits of an integer as a signed number."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word
