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
    All `len(stream) - T` starts of a stream can occur. All draws come from `generator` (on the
    CPU; None means torch's global one) and do not depend on the order of the two mappings.

    Raises:
        ValueError: if the names in `p` and `sources` differ, probabilities are negative or do not
            sum to 1 (within 1e-6), or a stream is shorter than T + 1.
    """
    windows = bytearray()
    for name, start in draw_rows(sources, p=p, B=B, T=T, generator=generator):
        windows += sources[name][start : start + T + 1]
    ids = torch.frombuffer(windows, dtype=torch.uint8).view(B, T + 1)
    # cut and widened before the copy: MPS misreads bytes that do not start at a multiple of 4
    x, y = (part.to(torch.int64).contiguous().to(device) for part in (ids[:, :-1], ids[:, 1:]))
    return x, y


def draw_rows(
    sources: Mapping[str, bytes],
    *,
    p: Mapping[str, float],
    B: int,
    T: int,
    generator: torch.Generator | None = None,
) -> list[tuple[str, int]]:
    """Return the source and start of each row of the batch that `get_batch` would return."""
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
    """Drop sources that are absent or have probability 0, and scale the rest to sum to 1.

    If only zeros are dropped, the probabilities are exactly those of `p`.

    Raises:
        ValueError: if nothing is left.
    """
    kept = {name: value for name, value in p.items() if name in available and value > 0}
    if not kept:
        raise ValueError(f"no source in p is available: p={dict(p)}")
    if all(name in kept for name, value in p.items() if value > 0):
        return kept
    total = math.fsum(kept.values())
    return {name: value / total for name, value in kept.items()}


def _check(sources: Mapping[str, bytes], p: Mapping[str, float], B: int, T: int) -> None:
    if B < 1 or T < 1:
        raise ValueError(f"B={B} and T={T} must be at least 1")
    if p.keys() != sources.keys():
        raise ValueError(
            f"keys of p and sources differ: p has {sorted(p)}, sources has {sorted(sources)}"
        )
    total = math.fsum(p.values())
    if not all(value >= 0 for value in p.values()) or abs(total - 1) > 1e-6:
        raise ValueError(f"probabilities must be >= 0 and sum to 1.0, not {total}: p={dict(p)}")
    if short := {name: len(sources[name]) for name in sorted(p) if len(sources[name]) < T + 1}:
        raise ValueError(f"sources too short for T+1={T + 1} bytes: {short}")
