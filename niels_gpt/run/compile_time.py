"""How long compiling took last time, kept in the cache folder: no bit of a run depends on it."""

import contextlib
import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from niels_gpt import paths
from niels_gpt.files import durable
from niels_gpt.files.strict_json import load_json
from niels_gpt.state import TrainState

MAX_KEPT = 100


def expected_time(state: TrainState) -> str:
    """Say how long compiling the step of this state may take."""
    seconds = _times().get(_key(state))
    if seconds is None:
        return "this takes half a minute or more the first time (--no-compile goes without)"
    return f"this took {seconds:.0f} s last time"


def remember_time(state: TrainState, seconds: float) -> None:
    """Keep how long compiling took; do nothing if that cannot be written."""
    times = {name: value for name, value in _times().items() if name != _key(state)}
    kept = dict([*times.items(), (_key(state), round(seconds, 1))][-MAX_KEPT:])
    with contextlib.suppress(OSError):
        durable.make_folder(_file().parent)
        durable.write_durably([_file()], json.dumps(kept, indent=2).encode())


def _key(state: TrainState) -> str:
    """Return what the time depends on: the shapes, the optimizer and the compiler."""
    cfg = state.train_cfg
    shape = " ".join(map(str, (*astuple(state.model_cfg), cfg.B)))
    return f"torch {torch.__version__}, {state.device}, {cfg.optimizer}, {shape}"


def _times() -> dict[str, float]:
    """Return the seconds by key; {} if the file is missing or not what this program writes."""
    try:
        found: Any = load_json(_file())
    except (OSError, ValueError):
        return {}
    kept = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in kept if isinstance(value, int | float)}


def _file() -> Path:
    return paths.REPO_ROOT / "data" / "cache" / "compile.json"
