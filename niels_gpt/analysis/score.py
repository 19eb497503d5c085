"""How well a model predicts a text: nats and bits per byte, with a standard error.

`sampled_windows` are the random windows of `evaluate`: fast, with the same result as the log of a
training run. `full_windows` slide over the stream and score each byte once: the result depends
only on text, model and stride, so use it to compare models. `score` summarises either.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from niels_gpt.eval import batches_of
from niels_gpt.loss import forward, row_blocks, rows_per_block
from niels_gpt.state import TrainState

FIRST_BYTE_NATS = math.log(256)  # it has no context: all byte values are equally likely


class Window(NamedTuple):
    """The result of one window: the number of scored bytes, and their total loss."""

    scored: int
    nats: float


class Score(NamedTuple):
    """The loss of a stream, per byte."""

    nats: float
    bits_per_byte: float
    standard_error: float | None  # of `nats`; None for fewer than two windows
    scored: int  # bytes


class Span(NamedTuple):
    """A window of a stream: bytes are read from `start`; the last `scored` targets count."""

    start: int
    scored: int


def score(windows: Iterable[Window]) -> Score:
    """Summarise windows; their order does not matter.

    The standard error assumes independent windows (for unequal sizes, that of a ratio: Cochran
    1977, eq. 6.13). In a full score, neighbouring windows are slightly dependent, so it is a little
    too small.

    Raises:
        ValueError: if nothing was scored.
    """
    windows = list(windows)
    count = sum(w.scored for w in windows)
    if not count:
        raise ValueError("nothing to score: the text is empty")
    nats = math.fsum(w.nats for w in windows) / count
    n = len(windows)
    squares = math.fsum((w.nats - nats * w.scored) ** 2 for w in windows)
    error = math.sqrt(squares * n / (n - 1)) / count if n > 1 else None
    return Score(nats, nats / math.log(2), error, count)


def sampled_windows(state: TrainState, stream: bytes, seed: int) -> Iterator[Window]:
    """Score the random windows of `evaluate(state, stream, seed)`, in its order.

    Raises:
        ValueError: if the stream is shorter than T + 1.
    """
    for batch in batches_of(state, stream, seed):
        for (x, y), _ in row_blocks(batch):
            for losses in byte_losses(state, x, y):
                yield Window(len(losses), math.fsum(losses))


def full_windows(
    state: TrainState, stream: bytes, *, stride: int | None = None, rows: int | None = None
) -> Iterator[Window]:
    """Score every byte of a stream exactly once.

    The first byte has no context and counts as ln 256 nats. The first T bytes see everything
    before them, each later byte the T - stride + 1 to T bytes before it.

    Args:
        stride: bytes from one window to the next, 1 to T, default T // 2. A smaller stride gives
            more context and takes longer: each byte is read T / stride times.
        rows: windows computed at a time. Affects memory and speed, the result only by rounding.

    Raises:
        ValueError: if the stride is not in 1 to T.
    """
    T = state.model_cfg.T
    stride = default_stride(T) if stride is None else stride
    rows = rows_per_block(T) if rows is None else rows
    if len(stream) == 1:
        yield Window(1, FIRST_BYTE_NATS)
    spans = sliding_spans(len(stream), T, stride)
    width = min(T, len(stream) - 1)
    for i in range(0, len(spans), rows):
        chunk = spans[i : i + rows]
        x, y = _gather(stream, chunk, width, state.device)
        for span, losses in zip(chunk, byte_losses(state, x, y), strict=True):
            first = [FIRST_BYTE_NATS] if span.start == 0 else []
            counted = [*first, *losses[width - span.scored :]]
            yield Window(len(counted), math.fsum(counted))


def default_stride(T: int) -> int:
    """Return the stride of a full score: half a window."""
    return max(1, T // 2)


def sliding_spans(n: int, T: int, stride: int) -> list[Span]:
    """Cut a stream of n bytes into windows of T bytes, whose scored targets are bytes 1 to n - 1.

    The first scores all its targets, the others the last `stride` of them. The last window ends
    with the stream and starts early enough to have T bytes too.
    """
    if not 1 <= stride <= T:
        raise ValueError(f"stride={stride} must be from 1 to T={T}")
    last = n - 1  # the highest index of a target
    if last < 1:
        return []
    spans = [Span(0, min(T, last))]
    for end in range(T + stride, last + stride, stride):
        done, end = end - stride, min(end, last)
        spans.append(Span(end - T, end - done))
    return spans


@torch.no_grad()
def byte_losses(state: TrainState, x: Tensor, y: Tensor) -> list[list[float]]:
    """Return the cross entropy in nats of each of the ids y (B, T) after the ids x (B, T)."""
    logits = forward(state.params, x, state.model_cfg)
    losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
    by_row: list[list[float]] = losses.view(y.shape).tolist()
    return by_row


def _gather(
    stream: bytes, spans: list[Span], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    joined = bytearray(b"".join(stream[s.start : s.start + width + 1] for s in spans))
    ids = torch.frombuffer(joined, dtype=torch.uint8).view(len(spans), width + 1)
    ids = ids.to(device=device, dtype=torch.int64)
    return ids[:, :-1], ids[:, 1:]
