"""Random training windows, cut out of byte streams.

Shapes: B rows, T positions. A window is T + 1 bytes: the first T are the input, the last T the
target.
"""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

# A start is (62 random bits) mod (number of starts): its bias is below len(stream) / 2**62.
_START_RANGE = 2**62


def get_batch(
    sources: Mapping[str, bytes],
    *,
    p: Mapping[str, float],
    B: int,
    T: int,
    device: str | torch.device,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw B windows: the source of each row with probabilities `p`, its start uniformly.

    Returns x and y, both int64 (B, T) on `device`, contiguous, with `y[:, :-1] == x[:, 1:]`.
    All `len(stream) - T` starts of a stream can occur. Every draw comes from `generator` (on the
    CPU; None is torch's global one) and does not depend on the order of the two mappings.

    Raises ValueError for names that differ between `p` and `sources`, probabilities that are
    negative or do not sum to 1 (within 1e-6), and streams shorter than T + 1.
    """
    windows = bytearray()
    for name, start in draw_rows(sources, p=p, B=B, T=T, generator=generator):
        windows += sources[name][start : start + T + 1]
    ids = torch.frombuffer(windows, dtype=torch.uint8).view(B, T + 1).to(device)  # (B, T+1)
    return ids[:, :-1].to(torch.int64).contiguous(), ids[:, 1:].to(torch.int64).contiguous()


def draw_rows(
    sources: Mapping[str, bytes],
    *,
    p: Mapping[str, float],
    B: int,
    T: int,
    generator: torch.Generator | None = None,
) -> list[tuple[str, int]]:
    """Return the source and the start of each row of the batch that `get_batch` would cut."""
    names = sorted(p)
    _check(sources, p, B, T)
    weights = torch.tensor([p[name] for name in names], dtype=torch.float32)
    rows = torch.multinomial(weights, B, replacement=True, generator=generator).tolist()
    draws = torch.randint(_START_RANGE, (B,), generator=generator).tolist()
    return [
        (names[row], draw % (len(sources[names[row]]) - T))
        for row, draw in zip(rows, draws, strict=True)
    ]


def renormalise(p: Mapping[str, float], available: Collection[str]) -> dict[str, float]:
    """Leave out what is absent or has probability 0, and scale the rest to sum to 1.

    Where nothing but zeros is left out, the probabilities are those of `p`, unrounded. Raises
    ValueError when nothing is left.
    """
    kept = {name: value for name, value in p.items() if name in available and value > 0}
    if not kept:
        raise ValueError(f"none of the sources of p is available: p={dict(p)}")
    if all(name in kept for name, value in p.items() if value > 0):
        return kept
    total = math.fsum(kept.values())
    return {name: value / total for name, value in kept.items()}


def _check(sources: Mapping[str, bytes], p: Mapping[str, float], B: int, T: int) -> None:
    if B < 1 or T < 1:
        raise ValueError(f"B={B} and T={T} have to be at least 1")
    if p.keys() != sources.keys():
        raise ValueError(
            f"keys of p and sources differ: p has {sorted(p)}, sources has {sorted(sources)}"
        )
    total = math.fsum(p.values())
    if not all(value >= 0 for value in p.values()) or abs(total - 1) > 1e-6:
        raise ValueError(f"probabilities have to be >= 0 and sum to 1, not {total}: p={dict(p)}")
    if short := {name: len(sources[name]) for name in sorted(p) if len(sources[name]) < T + 1}:
        raise ValueError(f"sources shorter than T+1={T + 1} bytes: {short}")
