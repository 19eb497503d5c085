"""How well a model predicts a text: nats and bits per byte, with a standard error.

`sampled_windows` are the random windows of `evaluate`: fast, with the same result as the log of a
training run. `full_windows` slide over the stream and score each byte once: the result depends
only on text, model and stride, so use it to compare models. `score` summarises either;
`score_checkpoint` opens checkpoint and text first.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from niels_gpt import streams
from niels_gpt.checkpoint import Checkpoint, SourceRecords
from niels_gpt.config import TrainConfig
from niels_gpt.data.cache import digest
from niels_gpt.data.text import not_utf8
from niels_gpt.eval import batches_of
from niels_gpt.files.mapped import open_bytes
from niels_gpt.inference.load import load_model
from niels_gpt.loss import forward, row_blocks, rows_per_block
from niels_gpt.optim import optimizer_of
from niels_gpt.state import TrainState
from niels_gpt.streams import Built, SourceInfo, Sources, StreamBuildConfig

FILE = "file"  # the origin of a text that is not a source
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


# --- a checkpoint ------------------------------------------------------------------------------


class Sampled(NamedTuple):
    """Score the random windows of a run's evaluations; None: the checkpoint's value."""

    seed: int | None = None
    eval_steps: int | None = None


class Full(NamedTuple):
    """Score every byte once; None: the default of `full_windows`."""

    stride: int | None = None
    rows: int | None = None


class Report(NamedTuple):
    """The scores by name of the stream, and how they were computed."""

    step: int
    method: dict[str, Any]
    scores: dict[str, Score]
    infos: dict[str, SourceInfo]
    messages: list[str]


OpenText = Callable[[TrainState, SourceRecords | None], Sources]
OnProgress = Callable[[str, int, int], object]  # called with (stream, bytes scored, bytes in total)


def score_checkpoint(
    path: Path,
    open_text: OpenText,
    method: Sampled | Full,
    *,
    device: str = "cpu",
    on_progress: OnProgress = lambda name, done, total: None,
) -> Report:
    """Score a checkpoint on the streams that `open_text` finds for its state and its sources.

    Raises:
        OSError, ValueError, RuntimeError: for an invalid checkpoint, text or method.
    """
    checkpoint = load_model(path, device)
    state, messages = scored_state(checkpoint)
    if isinstance(method, Sampled):
        cfg = state.train_cfg
        steps = cfg.eval_steps if method.eval_steps is None else method.eval_steps
        state = state._replace(train_cfg=replace(cfg, eval_steps=steps))
        method = Sampled(cfg.seed if method.seed is None else method.seed, steps)
    else:
        stride = default_stride(state.model_cfg.T) if method.stride is None else method.stride
        method = method._replace(stride=stride)
    text = open_text(state, checkpoint.sources)
    scores = {
        name: score(_told(windows(state, stream, method), name, total, on_progress))
        for name, stream in text.items()
        if (total := bytes_to_score(state, stream, method))
    }
    infos = streams.describe_sources(text)
    messages += text.messages + text.left_out() + changed_texts(checkpoint.sources, infos)
    return Report(state.step, describe_method(method), scores, infos, messages)


def scored_state(checkpoint: Checkpoint) -> tuple[TrainState, list[str]]:
    """Return the state of a checkpoint without the optimizer's trees, and messages."""
    messages = []
    try:
        _, train_cfg = checkpoint.configs
    except ValueError:
        train_cfg = TrainConfig()
        messages.append(
            "train_cfg is from another program: using default batch size, steps and seed"
        )
    opt_state = optimizer_of(train_cfg).init({})
    return TrainState(
        checkpoint.params, opt_state, checkpoint.step, checkpoint.cfg, train_cfg
    ), messages


def windows(state: TrainState, stream: bytes, method: Sampled | Full) -> Iterator[Window]:
    """Score a stream by a method without open defaults."""
    if isinstance(method, Full):
        return full_windows(state, stream, stride=method.stride, rows=method.rows)
    assert method.seed is not None
    return sampled_windows(state, stream, method.seed)


def bytes_to_score(state: TrainState, stream: bytes, method: Sampled | Full) -> int:
    """Count the bytes that a method scores; sampled windows may overlap."""
    if isinstance(method, Full):
        return len(stream)
    return state.train_cfg.eval_steps * state.train_cfg.B * state.model_cfg.T


def describe_method(method: Sampled | Full) -> dict[str, Any]:
    """Return what must be equal for two scores to be comparable."""
    if isinstance(method, Full):
        return {"method": "full", "stride": method.stride}
    return {"method": "sampled", **method._asdict()}


# --- text --------------------------------------------------------------------------------------


def open_file(path: Path, *, length: int = 1, records: SourceRecords | None = None) -> Sources:
    """Return the raw bytes of a file as a source.

    A message warns if the run of the checkpoint with these records trained on such a text.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is empty, or shorter than `length` bytes.
    """
    data = open_bytes(path)
    if not data:
        raise ValueError(f"{path}: the file is empty")
    if len(data) < length:
        raise ValueError(f"{path}: {_too_short(data, length)}")
    info = SourceInfo(FILE, str(path), len(data), digest(data).sha256)
    problem = not_utf8(data)
    messages = [f"{path}: {problem}"] if problem else []
    if "text" in (records or {}).get("train", {}):
        messages.append(
            f"{path}: scored as a whole, the part included that the model may have been trained "
            "on; --source text scores the validation part"
        )
    return Sources({path.name: Built(data, info)}, {}, messages)


def open_validation(
    where: StreamBuildConfig, names: Iterable[str], seed: int, *, length: int
) -> Sources:
    """Return the validation streams of the named sources, or of all available ones.

    They are split as in a run with this seed. A source that is neither in `names` nor in
    `where.places` is left out if it is absent or shorter than `length` bytes.

    Raises:
        RuntimeError, ValueError: if any other source cannot be scored, or no source is left.
    """
    names = tuple(dict.fromkeys(names))
    scored = names or where.enabled_sources
    cfg = replace(
        where,
        T=0,
        seed=seed,
        enabled_sources=tuple(dict.fromkeys([*scored, *where.places])),
        required_sources=names,
        wiki_fallback=True,
    )
    _, val = streams.build_sources(cfg)
    kept, missing = {}, dict(val.missing)
    for name in scored:
        stream = val.get(name, b"")
        if len(stream) >= max(1, length):
            kept[name] = val.built[name]
            continue
        why = missing.setdefault(name, _too_short(stream, length))
        if name in names or name in where.places:
            raise ValueError(f"source {name!r} cannot be scored: {why}")
    if not kept:
        raise ValueError("no text to score" + "".join(f"; {n}: {w}" for n, w in missing.items()))
    return Sources(kept, missing, val.messages)


def _too_short(stream: bytes, length: int) -> str:
    if not stream:
        return "its validation text is empty"
    return (
        f"{len(stream)} bytes, shorter than T+1={length}, "
        "the length of a window; use --full to score every byte"
    )


def changed_texts(sources: SourceRecords | None, infos: Mapping[str, SourceInfo]) -> list[str]:
    """Return a message for each stream that differs from the run's validation text."""
    before = (sources or {}).get("val", {})
    return [
        f"{name}: not the text of the run ({before[name]['origin']}, "
        f"{before[name]['bytes']:,} bytes), but {info.origin}, {info.nbytes:,} bytes; "
        "it may contain text that the model was trained on"
        for name, info in infos.items()
        if info.origin != FILE and name in before and before[name]["sha256"] != info.sha256
    ]


def _told(
    scored: Iterable[Window], name: str, total: int, on_progress: OnProgress
) -> Iterator[Window]:
    done = 0
    for window in scored:
        done += window.scored
        on_progress(name, done, total)
        yield window
