"""Evaluate a checkpoint: open it, open the text, score one with the other."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from niels_gpt import streams
from niels_gpt.analysis.score import (
    Score,
    Window,
    default_stride,
    full_windows,
    sampled_windows,
    score,
)
from niels_gpt.checkpoint import Checkpoint, SourceRecords
from niels_gpt.config import TrainConfig
from niels_gpt.data.cache import digest
from niels_gpt.inference.load import load_model
from niels_gpt.optim import optimizer_of
from niels_gpt.state import TrainState
from niels_gpt.streams import Built, SourceInfo, Sources, StreamBuildConfig

FILE = "file"  # the origin of a text that is no source


class Sampled(NamedTuple):
    """Score the random windows that a training evaluates on; None: as the checkpoint has it."""

    seed: int | None = None
    eval_steps: int | None = None


class Full(NamedTuple):
    """Score every byte once; None for the defaults of `full_windows`."""

    stride: int | None = None
    rows: int | None = None


class Report(NamedTuple):
    """What was scored, how, and the outcome by name of the stream."""

    step: int
    method: dict[str, Any]
    scores: dict[str, Score]
    infos: dict[str, SourceInfo]
    messages: list[str]


OpenText = Callable[[TrainState], Sources]
OnProgress = Callable[[str, int, int], object]  # told the stream, its bytes scored, bytes in all


def evaluate_checkpoint(
    path: Path,
    open_text: OpenText,
    method: Sampled | Full,
    *,
    device: str = "cpu",
    on_progress: OnProgress = lambda name, done, total: None,
) -> Report:
    """Score a checkpoint on the streams that `open_text` finds for its state.

    Raises:
        OSError, ValueError, RuntimeError: with what is wrong with the checkpoint, text or method.
    """
    checkpoint = load_model(path, device)
    state, messages = evaluated_state(checkpoint)
    if isinstance(method, Sampled):
        cfg = state.train_cfg
        steps = cfg.eval_steps if method.eval_steps is None else method.eval_steps
        state = state._replace(train_cfg=replace(cfg, eval_steps=steps))
        method = Sampled(cfg.seed if method.seed is None else method.seed, steps)
    else:
        stride = default_stride(state.model_cfg.T) if method.stride is None else method.stride
        method = method._replace(stride=stride)
    text = open_text(state)
    if isinstance(method, Sampled):
        _check_lengths(text, state.model_cfg.T)
    scores = {
        name: score(_told(windows(state, stream, method), name, total, on_progress))
        for name, stream in text.items()
        if (total := bytes_to_score(state, stream, method))
    }
    infos = streams.describe_sources(text)
    messages += text.messages + text.left_out() + changed_texts(checkpoint.sources, infos)
    return Report(state.step, describe_method(method), scores, infos, messages)


def evaluated_state(checkpoint: Checkpoint) -> tuple[TrainState, list[str]]:
    """Return a checkpoint as a state without the optimizer's trees, and messages."""
    messages = []
    try:
        _, train_cfg = checkpoint.configs
    except ValueError:
        train_cfg = TrainConfig()
        messages.append(
            "train_cfg is another program's: batch size, steps and seed are the defaults"
        )
    opt_state = optimizer_of(train_cfg).init({})
    return TrainState(
        checkpoint.params, opt_state, checkpoint.step, checkpoint.cfg, train_cfg
    ), messages


def windows(state: TrainState, stream: bytes, method: Sampled | Full) -> Iterator[Window]:
    """Score a stream by a method whose defaults are filled in."""
    if isinstance(method, Full):
        return full_windows(state, stream, stride=method.stride, rows=method.rows)
    assert method.seed is not None
    return sampled_windows(state, stream, method.seed)


def bytes_to_score(state: TrainState, stream: bytes, method: Sampled | Full) -> int:
    """Count the bytes that a method scores; those of sampled windows may overlap."""
    if isinstance(method, Full):
        return len(stream)
    return state.train_cfg.eval_steps * state.train_cfg.B * state.model_cfg.T


def describe_method(method: Sampled | Full) -> dict[str, Any]:
    """Return what has to be the same for two scores to be compared."""
    if isinstance(method, Full):
        return {"method": "full", "stride": method.stride}
    return {"method": "sampled", **method._asdict()}


# --- text --------------------------------------------------------------------------------------


def open_file(path: Path) -> Sources:
    """Return the bytes of a file, as they are.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is empty.
    """
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path}: the file is empty")
    info = SourceInfo(FILE, str(path), len(data), digest(data).sha256)
    return Sources({path.name: Built(data, info)}, {}, [])


def open_validation(
    where: StreamBuildConfig,
    names: Iterable[str],
    model_T: int,
    seed: int,
    given: Iterable[str] = (),
) -> Sources:
    """Return the validation streams of the named sources, or of all that there are.

    They are split as a training with this seed splits them.

    Args:
        given: sources whose place the user named, so that it is no accident if they are absent.

    Raises:
        RuntimeError, ValueError: if a source that is named or given cannot be built.
    """
    names = tuple(dict.fromkeys(names))
    cfg = replace(
        where,
        T=model_T,
        seed=seed,
        enabled_sources=names or where.enabled_sources,
        required_sources=names,
        wiki_fallback=True,
    )
    _, val = streams.build_sources(cfg)
    for name in given:
        if name in val.missing:
            raise RuntimeError(f"source {name!r} cannot be built: {val.missing[name]}")
    return val


def _check_lengths(text: Sources, T: int) -> None:
    for name, (stream, info, _) in text.built.items():
        if len(stream) <= T:
            raise ValueError(
                f"{info.place or name}: {len(stream)} bytes, shorter than T+1={T + 1}, "
                "the length of a sample; --full scores every byte of it"
            )


def changed_texts(sources: SourceRecords | None, infos: Mapping[str, SourceInfo]) -> list[str]:
    """Say which streams are not those that the training of a checkpoint evaluated on."""
    before = (sources or {}).get("val", {})
    return [
        f"{name}: not the text of the training ({before[name]['origin']}, "
        f"{before[name]['bytes']:,} bytes), but {info.origin}, {info.nbytes:,} bytes; "
        "it may hold what the model was trained on"
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
