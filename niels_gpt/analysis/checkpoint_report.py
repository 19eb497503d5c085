"""Reports on checkpoints: their content, whether they are good, and how two differ."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from niels_gpt.checkpoint import Checkpoint, open_checkpoint, read_checkpoint
from niels_gpt.config import dotted
from niels_gpt.files.names import checkpoint_files
from niels_gpt.inference.export import read_export
from niels_gpt.model.flops import parameter_count
from niels_gpt.optim.trees import same_bits

MISSING = "(absent)"


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint as JSON-like values.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`.
    """
    found = open_checkpoint(path)
    return {
        "path": str(path),
        "file_bytes": path.stat().st_size,
        "digest": found.digest,
        "step": found.step,
        "best_val_loss": found.scores.best_val_loss,
        "val_source": found.val_source,
        "parameters": parameter_count(found.cfg),
        "has_optimizer_state": found.optimizer_state is not None,
        "model_cfg": found.model_cfg,
        "train_cfg": found.train_cfg,
        "scores": found.scores._asdict(),
        "sources": found.sources or {},
        "environment": found.environment,
        "ancestors": found.ancestors,
        "messages": found.messages,
    }


class Verdict(NamedTuple):
    """Whether a file is a good checkpoint, or the model of a whole export."""

    path: Path
    problem: str | None  # None if it is good
    step: int | None
    digest: str | None  # None if another program wrote it


def verify(path: Path) -> Verdict:
    """Read a whole file and verify it as `open_checkpoint` does, an export by its SHA-256."""
    try:
        if path.suffix == ".safetensors":
            return Verdict(path, None, *read_export(path))
        found = read_checkpoint(path)
    except (ValueError, OSError) as error:
        return Verdict(path, str(error).removeprefix(f"{path}: "), None, None)
    return Verdict(path, None, found.step, found.digest)


def checkpoints_in(path: Path) -> list[Path]:
    """Return the checkpoints of a folder, or the file itself.

    Raises:
        FileNotFoundError: if there is no such path, or no checkpoint in the folder.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path]
    found = checkpoint_files(path)
    if not found:
        raise FileNotFoundError(f"{path}: no checkpoints in this folder")
    return found


class Change(NamedTuple):
    """The change of a parameter from one checkpoint to another."""

    name: str
    relative: float  # norm of the difference over the norm in the first; infinite if that is 0
    largest: float  # of the absolute differences


class Comparison(NamedTuple):
    """The differences between two checkpoints."""

    settings: list[tuple[str, Any, Any]]  # dotted name, the value in a, the value in b
    parameters: list[Change]  # the changed ones, largest change first
    same: int  # number of bit-identical parameters
    unlike: list[str]  # parameters with different shapes or in only one of them


def compare(a: Checkpoint, b: Checkpoint) -> Comparison:
    """Compare two checkpoints, except for the optimizer state."""
    shapes, others = ({name: p.shape for name, p in c.params.items()} for c in (a, b))
    common = [name for name in shapes if shapes[name] == others.get(name)]
    unlike = [name for name in {**shapes, **others} if name not in common]
    pairs = {name: (a.params[name], b.params[name]) for name in common}
    moved = [_change(name, *pair) for name, pair in pairs.items() if not same_bits(*pair)]
    return Comparison(
        settings=[*_different_settings(a, b)],
        parameters=sorted(moved, key=lambda change: (-change.relative, change.name)),
        same=len(pairs) - len(moved),
        unlike=unlike,
    )


def _change(name: str, a: Any, b: Any) -> Change:
    moved, size = (b - a).norm().item(), a.norm().item()
    relative = moved / size if size else (math.inf if moved else 0.0)
    return Change(name, relative, (b - a).abs().max().item())


def _different_settings(a: Checkpoint, b: Checkpoint) -> Iterable[tuple[str, Any, Any]]:
    one, other = (dotted(_settings(c)) for c in (a, b))
    for key in {**one, **other}:
        values = one.get(key, MISSING), other.get(key, MISSING)
        if values[0] != values[1]:
            yield key, *values


def _settings(c: Checkpoint) -> dict[str, Any]:
    """Return everything but the tensors as a tree, with the best loss once."""
    scores = c.scores._asdict()
    return {
        "step": c.step,
        "best_val_loss": scores.pop("best_val_loss"),
        "scores": scores,
        "model_cfg": c.model_cfg,
        "train_cfg": c.train_cfg,
        "sources": c.sources or {},
        "environment": c.environment,
        "first weights": c.ancestors[0].digest if c.ancestors else "drawn",
    }
