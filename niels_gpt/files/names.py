"""The names of the files in a run's folder."""

import os
import re
from pathlib import Path

LATEST = "latest.pt"
BEST = "best.pt"
METRICS = "metrics.jsonl"
CALL = ".run.json"  # how the run was called
TRAIN_FIRST = "train a model first: niels-gpt train --config quick"

_PERIODIC = re.compile(r"step_([0-9]{7,})\.pt")


def step_name(step: int) -> str:
    """Return the name of the periodic checkpoint after this many updates."""
    return f"step_{step:07d}.pt"


def step_of_name(name: str) -> int | None:
    """Return the step in the name of a periodic checkpoint; None for other names."""
    match = _PERIODIC.fullmatch(name)
    return int(match[1]) if match else None


def checkpoint_files(folder: Path) -> list[Path]:
    """List the checkpoints of a folder: latest.pt, the periodic ones newest first, best.pt."""
    names = set(os.listdir(folder))
    periodic = {name: step for name in names if (step := step_of_name(name)) is not None}
    ordered = [LATEST, *sorted(periodic, key=lambda name: -periodic[name]), BEST]
    return [folder / name for name in ordered if name in names]


def model_in(path: Path) -> Path:
    """Return the checkpoint to use: best.pt, else latest.pt, else the newest periodic one.

    A file is returned as it is.

    Raises:
        FileNotFoundError: if it is a folder with none; the message says what to do.
    """
    if not path.is_dir():
        return path
    files = {file.name: file for file in checkpoint_files(path)}
    for name in (BEST, LATEST, *files):
        if name in files:
            return files[name]
    raise FileNotFoundError(
        f"{path}: no checkpoints in this folder; name another one, or {TRAIN_FIRST}"
    )


def run_files(folder: Path) -> list[Path]:
    """List the files of a run in a folder: its checkpoints and metrics."""
    metrics = folder / METRICS
    return [*checkpoint_files(folder), *([metrics] if os.path.lexists(metrics) else [])]


def periodic_files(folder: Path) -> dict[int, Path]:
    """Return the periodic checkpoints of a folder by the step in their names."""
    steps = {path: step_of_name(path.name) for path in checkpoint_files(folder)}
    return {step: path for path, step in steps.items() if step is not None}
