"""What checkpoints hold, whether they are good, and how two differ."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from niels_gpt.checkpoint import load_checkpoint, own_files, resume_notes
from niels_gpt.config import ModelConfig
from niels_gpt.files.schema import Payload, parameter_shapes
from niels_gpt.files.torchfile import CheckpointError
from niels_gpt.model.flops import parameter_count
from niels_gpt.record import kept_environment, kept_scores, kept_sources

MISSING = "(absent)"


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Say what a checkpoint holds, as JSON-like values.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`.
    """
    payload = load_checkpoint(path, device="cpu")
    return {
        "path": str(path),
        "file_bytes": path.stat().st_size,
        "digest": payload.get("digest"),
        "step": payload["step"],
        "best_val_loss": payload["best_val_loss"],
        "parameters": parameter_count(ModelConfig(**payload["model_cfg"])),
        "has_optimizer_state": payload["optimizer_state"] is not None,
        "model_cfg": payload["model_cfg"],
        "train_cfg": payload["train_cfg"],
        "scores": kept_scores(payload)._asdict(),
        "sources": kept_sources(payload) or {},
        "environment": kept_environment(payload),
        "notes": resume_notes(payload),
    }


class Verdict(NamedTuple):
    """Whether a file is a good checkpoint."""

    path: Path
    problem: str | None  # None for a good one
    step: int | None
    digest: str | None  # None in files of other programs


def verify(path: Path) -> Verdict:
    """Read a file wholly and check all that `load_checkpoint` checks."""
    try:
        payload = load_checkpoint(path, device="cpu")
    except (CheckpointError, OSError) as error:
        return Verdict(path, str(error).removeprefix(f"{path}: "), None, None)
    return Verdict(path, None, payload["step"], payload.get("digest"))


def checkpoints_in(path: Path) -> list[Path]:
    """Return the checkpoints of a folder, or the file itself.

    Raises:
        FileNotFoundError: if there is no such path, or no checkpoint in the folder.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path]
    found = [path / name for name in own_files(path) if name.endswith(".pt")]
    if not found:
        raise FileNotFoundError(f"{path}: no checkpoints in this folder")
    return found


class Change(NamedTuple):
    """How far a parameter moved from one checkpoint to another."""

    name: str
    relative: float  # norm of the difference over the norm of the first; infinite from zero
    largest: float  # of the absolute differences


class Comparison(NamedTuple):
    """How two checkpoints differ."""

    settings: list[tuple[str, Any, Any]]  # dotted name, the value in a, the value in b
    parameters: list[Change]  # those that moved, the farthest first
    same: int  # parameters that did not move by a bit
    unlike: list[str]  # parameters that only one of them has, or of different shape


def compare(a: Path, b: Path) -> Comparison:
    """Compare two checkpoints.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`.
    """
    return compare_payloads(load_checkpoint(a, device="cpu"), load_checkpoint(b, device="cpu"))


def compare_payloads(a: Payload, b: Payload) -> Comparison:
    """Compare what two checkpoints hold; the optimizer's moments aside."""
    shapes, others = (parameter_shapes(ModelConfig(**p["model_cfg"])) for p in (a, b))
    common = [name for name in shapes if shapes[name] == others.get(name)]
    unlike = [name for name in {**shapes, **others} if name not in common]
    changes = [_change(name, a["model_state"][name], b["model_state"][name]) for name in common]
    moved = [change for change in changes if change.largest > 0]
    return Comparison(
        settings=[*_different_settings(a, b)],
        parameters=sorted(moved, key=lambda change: (-change.relative, change.name)),
        same=len(changes) - len(moved),
        unlike=unlike,
    )


def _change(name: str, a: Any, b: Any) -> Change:
    moved, size = (b - a).norm().item(), a.norm().item()
    relative = moved / size if size else (math.inf if moved else 0.0)
    return Change(name, relative, (b - a).abs().max().item())


_COMPARED = ("step", "best_val_loss", "scores", "model_cfg", "train_cfg", "sources", "environment")


def _different_settings(a: Payload, b: Payload) -> Iterable[tuple[str, Any, Any]]:
    one, other = ({key: p.get(key) for key in _COMPARED} for p in (a, b))
    flat_one, flat_other = _flat(one), _flat(other)
    for key in {**flat_one, **flat_other}:
        values = flat_one.get(key, MISSING), flat_other.get(key, MISSING)
        if values[0] != values[1]:
            yield key, *values


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
