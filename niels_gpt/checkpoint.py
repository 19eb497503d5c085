"""Checkpoint files: written whole or not at all, verified before any tensor is used.

A checkpoint is pr-06's plain dict through `torch.save`::

    model_cfg, train_cfg   plain JSON-like dicts
    model_state            GPT.state_dict(); "lm_head.weight" shares the storage of "tok_emb.weight"
    optimizer_state        state_dict() of the torch.optim optimizer, or None
    step                   finished updates
    best_val_loss          nats, or None
    ...                    whatever else the writer wants to keep, plain values
    digest                 SHA-256 of all of the above

It holds no clock, path or process id: the same content is the same bytes. Files of a plain loop
(that dict through `torch.save`, any optimizer of torch.optim, no digest) load as well.
"""

import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niels_gpt.config import ModelConfig, TrainConfig, config_from_dict, to_dict
from niels_gpt.files import durable
from niels_gpt.files.schema import (
    KEYS,
    MODEL_FIELDS,
    Payload,
    canonical_payload,
    check_payload,
    content_digest,
    names_by_id,
    parameter_shapes,
)
from niels_gpt.files.torchfile import CheckpointError, read_torch_file
from niels_gpt.model.gpt import GPT
from niels_gpt.optim import OptState, from_entries, optimizer_of, to_entries
from niels_gpt.optim.trees import map_tensors
from niels_gpt.state import TrainState

METRICS = "metrics.jsonl"
_CHECKPOINT = re.compile(r"latest\.pt|best\.pt|step_([0-9]{7,})\.pt")


# --- writing -----------------------------------------------------------------------------------


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model_cfg: dict[str, Any],
    train_cfg: dict[str, Any],
    model: GPT,
    optimizer: torch.optim.Optimizer | None,
    step: int,
    best_val_loss: float | None,
) -> None:
    """Save a model and its optimizer durably; `train_cfg` may be any JSON-like dict.

    Raises:
        CheckpointError: if a value cannot be stored, or is not finite.
        OSError: if the file cannot be written; what was there before still is.
    """
    payload = {
        "model_cfg": model_cfg,
        "train_cfg": train_cfg,
        "model_state": model.state_dict(),
        "optimizer_state": None if optimizer is None else optimizer.state_dict(),
        "step": step,
        "best_val_loss": best_val_loss,
    }
    write_checkpoint([path], payload)


def write_checkpoint(paths: Sequence[str | os.PathLike[str]], payload: Mapping[str, Any]) -> str:
    """Write one payload under each name in turn, durably, and return its digest.

    What would not load again is not written: the payload passes the same checks as a loaded one.

    Raises:
        CheckpointError: if a value cannot be stored, or is not finite.
        OSError: if a file cannot be written; that name and those after it keep what they held.
    """
    where = ", ".join(str(path) for path in paths)
    try:
        content = {key: value for key, value in payload.items() if key != "digest"}
        content = check_payload(canonical_payload(content))
    except CheckpointError as error:
        raise CheckpointError(f"not saved to {where}: {error}") from None
    digest = content_digest(content)
    buffer = io.BytesIO()
    torch.save({**content, "digest": digest}, buffer)
    durable.write_durably([Path(path) for path in paths], buffer.getbuffer())
    return digest


def state_payload(
    state: TrainState, *, best_val_loss: float | None, extra: Mapping[str, Any] | None = None
) -> Payload:
    """Return the dict that `write_checkpoint` takes; `extra` are more keys with plain values."""
    taken = {*KEYS, "digest"} & set(extra or ())
    if taken:
        raise ValueError(f"extra must not hold {', '.join(sorted(taken))}")
    return {
        "model_cfg": to_dict(state.model_cfg),
        "train_cfg": to_dict(state.train_cfg),
        "model_state": {**state.params, "lm_head.weight": state.params["tok_emb.weight"]},
        "optimizer_state": _optimizer_state(state),
        "step": state.step,
        "best_val_loss": best_val_loss,
        **(extra or {}),
    }


def _optimizer_state(state: TrainState) -> dict[str, Any]:
    """As `to_modules(state)[1].state_dict()`, without copying a tensor."""
    shapes, cfg = parameter_shapes(state.model_cfg), state.train_cfg
    params = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    twin = optimizer_of(cfg).twin(params, lr=cfg.base_lr, weight_decay=cfg.weight_decay)
    groups = twin.state_dict()["param_groups"]
    entries = to_entries(state.opt_state, shapes, state.step)
    ids = {name: i for i, name in names_by_id(groups, [*shapes]).items()}
    return {
        "state": {ids[name]: entry for name, entry in entries.items()},
        "param_groups": groups,
    }


# --- reading -----------------------------------------------------------------------------------


def load_checkpoint(path: str | os.PathLike[str], *, device: str | torch.device) -> Payload:
    """Read a checkpoint, verify it, and put its tensors on `device`.

    Nothing in the file is executed. Checked, in this order, before any tensor is used: the kind
    and size of the file, the zip directory, every CRC, the instructions of the pickle, then all
    keys, types, dtypes, shapes, strides and storages, that all is finite, and the digest where
    there is one.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not a good checkpoint, naming the first difference and, where the
            folder has one, a good checkpoint to use instead.
    """
    path = Path(path)
    try:
        payload = _read(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}{_hint(path)}") from None
    return _on_device(payload, torch.device(device))


def load_state(
    path: str | os.PathLike[str], *, device: str | torch.device
) -> tuple[TrainState, Payload]:
    """Read a checkpoint as a state under its own configs; return that and all that it holds.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not a good checkpoint.
        ValueError: if its configs are not those of this program.
    """
    payload = load_checkpoint(path, device=device)
    sections = {"model": payload["model_cfg"], "train": payload["train_cfg"]}
    configs = config_from_dict(sections, where=f"the configs in {path}")
    return state_from_payload(payload, *configs, device), payload


def _read(path: Path) -> Payload:
    payload = check_payload(read_torch_file(path))
    if "digest" in payload and payload["digest"] != content_digest(payload):
        raise CheckpointError("the content does not match its digest")
    return payload


def _on_device(payload: Payload, device: torch.device) -> Payload:
    if device.type == "cpu":
        return payload
    moved: Payload = {key: _moved(value, device) for key, value in payload.items()}
    moved["model_state"]["lm_head.weight"] = moved["model_state"]["tok_emb.weight"]
    return moved


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value


# --- resuming ----------------------------------------------------------------------------------


def validate_model_config_match(
    loaded: Mapping[str, Any] | ModelConfig, current: Mapping[str, Any] | ModelConfig
) -> None:
    """Raise ValueError with a line per field of the model in which the two differ."""
    a, b = (c if isinstance(c, Mapping) else to_dict(c) for c in (loaded, current))
    missing = "(missing)"
    lines = [
        f"  {name}: checkpoint {a.get(name, missing)!r}, config {b.get(name, missing)!r}"
        for name in MODEL_FIELDS
        if a.get(name, missing) != b.get(name, missing)
    ]
    if lines:
        raise ValueError("\n".join(["the checkpoint's model differs from the config:", *lines]))


def state_from_payload(
    payload: Mapping[str, Any],
    model_cfg: ModelConfig,
    train_cfg: TrainConfig,
    device: str | torch.device = "cpu",
) -> TrainState:
    """Return the state that a loaded checkpoint holds, to be continued under these configs.

    Without an optimizer state the optimizer starts afresh; `resume_notes` says so.

    Raises:
        ValueError: with a line per field, if the checkpoint's model is not of this shape.
        CheckpointError: if the optimizer state is not that of the config's optimizer.
    """
    validate_model_config_match(payload["model_cfg"], model_cfg)
    shapes = parameter_shapes(model_cfg)
    params = {name: payload["model_state"][name].to(device) for name in shapes}
    initial = optimizer_of(train_cfg).init(params)
    opt_state = _opt_state(payload["optimizer_state"], [*shapes], initial)
    return TrainState(params, opt_state, payload["step"], model_cfg, train_cfg)


def resume_notes(payload: Mapping[str, Any]) -> list[str]:
    """Say what a resume from this checkpoint cannot carry on exactly, a line each."""
    notes = []
    if "digest" not in payload:
        notes.append("the checkpoint was written by another program: the resume is not bit-exact")
    optimizer_state = payload["optimizer_state"]
    if optimizer_state is None:
        notes.append("the checkpoint has no optimizer state: it starts from zero")
        return notes
    counts = {float(e["step"]) for e in optimizer_state["state"].values() if "step" in e}
    if counts - {torch.tensor(payload["step"], dtype=torch.float32).item()}:
        notes.append(
            f"the checkpoint's step is {payload['step']}, its optimizer counted"
            f" {', '.join(f'{count:g}' for count in sorted(counts))} updates; the step is used"
        )
    return notes


def _opt_state(
    optimizer_state: Mapping[str, Any] | None, names: list[str], initial: OptState
) -> OptState:
    """Return what a state_dict holds, where there is one, on the device of the initial state."""
    if optimizer_state is None or not optimizer_state["state"]:
        return initial
    ids = names_by_id(optimizer_state["param_groups"], names)
    if len(ids) != len(names):
        raise CheckpointError(
            "the optimizer state has several parameter groups without names, so that it"
            " cannot be told which parameter is which; to resume without it, set it to None"
        )
    entries = {name: optimizer_state["state"].get(i, {}) for i, name in ids.items()}
    try:
        found = from_entries(entries, initial)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return map_tensors(lambda zero, t: t.to(zero.device), initial, found)


# --- the output folder -------------------------------------------------------------------------


def newest_good(folder: str | os.PathLike[str]) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the good checkpoint of the folder with the most steps, and those that were skipped.

    Of equals `latest.pt` comes first. A `step_*.pt` whose name promises no more than a good one
    already found is not read.
    """
    found: Path | None = None
    most = -1
    skipped = []
    for path in _checkpoints(Path(folder)):
        number = _CHECKPOINT.fullmatch(path.name)
        if number and number[1] and int(number[1]) <= most:
            continue
        try:
            step = _read(path)["step"]
        except (CheckpointError, FileNotFoundError) as error:
            skipped.append((path, str(error)))
            continue
        if step > most:
            found, most = path, step
    return found, skipped


def own_files(folder: str | os.PathLike[str]) -> list[str]:
    """Return the names in the folder that a run writes: its checkpoints and its metrics."""
    folder = Path(folder)
    metrics = [METRICS] if os.path.lexists(folder / METRICS) else []
    return [path.name for path in _checkpoints(folder)] + metrics


def _checkpoints(folder: Path) -> list[Path]:
    """latest.pt, the periodic ones from the newest on, best.pt."""
    names = [name for name in os.listdir(folder) if _CHECKPOINT.fullmatch(name)]
    order = {"latest.pt": (0, 0), "best.pt": (2, 0)}
    return [
        folder / name for name in sorted(names, key=lambda n: order.get(n) or (1, -int(n[5:-3])))
    ]


def _hint(path: Path) -> str:
    try:
        found, _ = newest_good(path if path.is_dir() else path.parent)
    except OSError:
        return ""
    return f"; the newest good checkpoint there is {found.name}" if found else ""
