"""Dropout whose masks are a pure function of (seed, step, row, site).

A mask bit is a hash of a counter under a key, as in Salmon et al. 2011 ("Parallel random numbers:
as easy as 1, 2, 3"). There is no generator and no state, so the masks are the same on every device,
for any number of threads, in one pass or row by row, under `vmap` and in a compiled graph.

Shapes: B rows, S sites (places in the model where dropout acts), two 32-bit key words each.
All words are int32 with wrapping arithmetic: MPS has no unsigned 32-bit integers.
"""

import math
import struct
import sys

import torch
from torch import Tensor

from niels_gpt.rng import derive_seed

DRAWS = 1 << 31  # values of one draw: a hash word without its lowest bit


def sites(L: int) -> int:
    """Count the sites of a model with L blocks: the embedding, and three in each block."""
    return 1 + 3 * L


def dropout_keys(seed: int, step: int, rows: range | Tensor, n_sites: int) -> Tensor:
    """Derive the keys of one step's masks: (len(rows), n_sites, 2) int32, on the CPU.

    `rows` are positions in the whole batch. To split a step by rows, into blocks or over
    processes, slice these keys (or pass the rows wanted): the masks are those of the whole.
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
    """Return the exact probability of keeping an element: 1 - p in steps of 2**-31, never 0."""
    return _kept(p) / DRAWS


def keep_mask(key: Tensor, shape: tuple[int, ...], p: float, *, start: int = 0) -> Tensor:
    """Draw the mask of one site: (B, *shape) bool, True with probability `keep_rate(p)`.

    Args:
        key: (B, 2) int32, one column of `dropout_keys`.
        shape: of one row's activations.
        p: probability of dropping an element, in [0, 1).
        start: the first counter, for a site whose mask is drawn in several pieces.
    """
    return scaled_mask(key, shape, p, start=start) != 0


def scaled_mask(key: Tensor, shape: tuple[int, ...], p: float, *, start: int = 0) -> Tensor:
    """Draw the factors of dropout: (B, *shape) float32, 1 / keep_rate(p) where kept, else 0.

    Arguments as `keep_mask`. The comparison with the rate sets all bits or none, which are then
    masked with the bits of the scale: integer operations in one buffer, a third of the time of
    converting through bool.
    """
    words = _hash(key, start, math.prod(shape))
    below = (words >> 1).sub_(_kept(p) - DRAWS // 2).bitwise_right_shift_(31)  # -1 keeps, 0 drops
    return below.bitwise_and_(_bits(1 / keep_rate(p))).view(torch.float32).view(-1, *shape)


def dropout(x: Tensor, key: Tensor, p: float, *, start: int = 0) -> Tensor:
    """Zero the dropped elements of x (B, ...) and scale the rest by 1 / keep_rate(p)."""
    return x * scaled_mask(key, tuple(x.shape[1:]), p, start=start)


def _kept(p: float) -> int:
    """Count the draws that keep an element: at least one does."""
    return max(1, DRAWS - round(p * DRAWS))


def _hash(key: Tensor, start: int, n: int) -> Tensor:
    """Hash the counters from `start` under keys (B, 2): (B, n) int32 words.

    The multipliers and the second shift are those of C. Wellons' `lowbias32`, with half of the key
    before and half between the two rounds: a key used only at the start would give every key the
    same words in another order. The rest of `lowbias32` improves only the low bits, unused here.
    """
    words = torch.arange(start, start + n, dtype=torch.int32, device=key.device) ^ key[:, :1]
    words.mul_(0x7FEB352D).bitwise_xor_(key[:, 1:])
    return words.bitwise_xor_((words >> 15).bitwise_and_(0x1FFFF)).mul_(_int32(0x846CA68B))


def _mix(word: Tensor, key: int) -> Tensor:
    """Hash int32 words in full: `lowbias32` with a key between its two rounds."""
    word = (word ^ ((word >> 16) & 0xFFFF)) * 0x7FEB352D
    word = word ^ key
    word = (word ^ ((word >> 15) & 0x1FFFF)) * _int32(0x846CA68B)
    return word ^ ((word >> 16) & 0xFFFF)


def _bits(scale: float) -> int:
    """Return the bits of a number as float32, read as an integer."""
    return int.from_bytes(struct.pack("=f", scale), sys.byteorder)


def _int32(word: int) -> int:
    """Read the low 32 bits of an integer as a signed number."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word
