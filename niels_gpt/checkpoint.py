"""Checkpoints: a value, and files that are written atomically and verified before use.

A file is pr-06's plain dict through `torch.save`::

    model_cfg, train_cfg   plain JSON-like dicts; `val_source` only if it is not "wiki"
    model_state            GPT.state_dict(); "lm_head.weight" shares the storage of "tok_emb.weight"
    optimizer_state        state_dict() of the torch.optim optimizer, or None
    step                   finished updates
    best_val_loss          nats, or None
    scores                 other evaluation results: best_step, val_loss, val_step
    sources                split -> source -> origin, bytes, sha256 of the text
    environment            other conditions that can change bits
    ancestors              digest and step of the checkpoint whose weights the run began with, then
                           of the one that its run began with, and so on; absent if they were drawn
    digest                 SHA-256 of all of the above

It contains no clock, path or process id: equal content gives equal bytes. Files of a plain loop
load too: the first six keys, any optimizer of torch.optim, any train_cfg, no digest.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from niels_gpt.config import ModelConfig, Problems, TrainConfig, config_from_dict, to_dict
from niels_gpt.eval import Scores
from niels_gpt.files.names import checkpoint_files, step_of_name
from niels_gpt.files.torchfile import CheckpointError, show
from niels_gpt.model.gpt import GPT
from niels_gpt.optim import OptState, from_entries, optimizer_of, to_state_dict
from niels_gpt.optim.trees import Tree, map_tensors
from niels_gpt.schema import (
    MODEL_FIELDS,
    Payload,
    canonical_payload,
    content_digest,
    file_size,
    names_by_id,
    parameter_shapes,
    read_payload,
    write_payload,
)
from niels_gpt.state import TrainState

SourceRecords = dict[str, dict[str, dict[str, Any]]]  # split -> source -> origin, bytes, sha256


class Ancestor(NamedTuple):
    """A checkpoint that a run started from: its weights became the first ones of the run."""

    digest: str
    step: int  # finished updates, in its own run


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A state of a run, with everything needed to resume it exactly.

    The configs are as in the file: `train_cfg` of another program may be anything.
    """

    model_cfg: dict[str, Any]
    train_cfg: dict[str, Any]
    params: Tree  # as in `TrainState`
    optimizer_state: dict[str, Any] | None  # the state_dict of a torch.optim optimizer
    step: int  # finished updates
    scores: Scores
    sources: SourceRecords | None  # the text it was trained on; None if not recorded
    environment: dict[str, Any]  # other conditions that can change bits
    ancestors: tuple[Ancestor, ...] = ()  # the nearest first; () for weights that were drawn
    digest: str | None = None  # of its file; None if another program wrote it
    path: Path = Path()  # where it was read from

    @cached_property
    def cfg(self) -> ModelConfig:
        """Return the model config."""
        return ModelConfig(**self.model_cfg)

    @cached_property
    def configs(self) -> tuple[ModelConfig, TrainConfig]:
        """Return the configs of the file.

        Raises:
            ValueError: if they are not valid configs of this program.
        """
        sections = {"model": self.model_cfg, "train": self.train_cfg}
        return config_from_dict(sections, where=f"the configs in {self.path}")

    @cached_property
    def state(self) -> TrainState:
        """Return the state under its own configs.

        Raises:
            ValueError: as `configs` and `state_under`.
        """
        return self.state_under(*self.configs)

    def state_under(self, model_cfg: ModelConfig, train_cfg: TrainConfig) -> TrainState:
        """Return the state under these configs, to continue with them.

        Without an optimizer state, the optimizer starts from zero; `messages` says so.

        Raises:
            ValueError: with a line per field, if the model is not of this shape.
            CheckpointError: if the optimizer state is not that of the config's optimizer.
        """
        validate_model_config_match(self.cfg, model_cfg)
        initial = optimizer_of(train_cfg).init(self.params)
        opt_state = _opt_state(self.optimizer_state, [*self.params], initial)
        return TrainState(self.params, opt_state, self.step, model_cfg, train_cfg)

    def start_under(self, model_cfg: ModelConfig, train_cfg: TrainConfig) -> TrainState:
        """Return step 0 of a new run that starts from these weights.

        Raises:
            ValueError: with a line per field, if the model differs in more than its dropout.
        """
        validate_model_config_match(replace(self.cfg, dropout=model_cfg.dropout), model_cfg)
        opt_state = optimizer_of(train_cfg).init(self.params)
        return TrainState(self.params, opt_state, 0, model_cfg, train_cfg)

    @property
    def lineage(self) -> tuple[Ancestor, ...]:
        """Return the ancestors of a run that starts from these weights: this one, then its own."""
        return (Ancestor(self.digest or digest_of(self), self.step), *self.ancestors)

    def on(self, device: str | torch.device) -> "Checkpoint":
        """Return the checkpoint with its parameters on a device."""
        return replace(self, params=map_tensors(lambda p: p.to(device), self.params))

    @property
    def val_source(self) -> str:
        """Return the source whose validation text its losses are of; "wiki" if it does not say."""
        return str(self.train_cfg.get("val_source", TrainConfig.val_source))

    @property
    def messages(self) -> list[str]:
        """Return what a resume from here cannot continue exactly, one line each."""
        messages = []
        if self.digest is None:
            messages.append(
                "the checkpoint was written by another program: the resume is not bit-exact"
            )
        if self.optimizer_state is None or (self.step and not self.optimizer_state["state"]):
            return [*messages, "the checkpoint has no optimizer state: it starts from zero"]
        entries = self.optimizer_state["state"].values()
        counts = {float(entry["step"]) for entry in entries if "step" in entry}
        if counts - {torch.tensor(self.step, dtype=torch.float32).item()}:
            messages.append(
                f"the checkpoint's step is {self.step}, but its optimizer counted"
                f" {', '.join(f'{count:g}' for count in sorted(counts))} updates; using the step"
            )
        return messages


def checkpoint_of(
    state: TrainState,
    scores: Scores | None = None,
    sources: SourceRecords | None = None,
    environment: Mapping[str, Any] | None = None,
    ancestors: tuple[Ancestor, ...] = (),
) -> Checkpoint:
    """Return the checkpoint of a state."""
    return Checkpoint(
        to_dict(state.model_cfg),
        _as_kept(state.train_cfg),
        state.params,
        _optimizer_state(state),
        state.step,
        scores or Scores(),
        sources,
        dict(environment or {}),
        ancestors,
    )


def _as_kept(cfg: TrainConfig) -> dict[str, Any]:
    """Return a config as its file has it: without the `val_source` that files without one mean."""
    kept = to_dict(cfg)
    if cfg.val_source == TrainConfig.val_source:
        del kept["val_source"]
    return kept


# --- files -------------------------------------------------------------------------------------


def write_checkpoint(paths: Sequence[str | os.PathLike[str]], checkpoint: Checkpoint) -> str:
    """Write a checkpoint durably under each name in turn; return its digest.

    Raises:
        CheckpointError: if a value cannot be stored or is not finite.
        OSError: if a file cannot be written; that name and those after it keep their content.
    """
    return write_payload(paths, payload_of(checkpoint))


def save_state(path: str | os.PathLike[str], state: TrainState) -> None:
    """Save a state durably, as a file that `train --resume` continues too.

    Raises:
        CheckpointError: if a value is not finite.
        OSError: if the file cannot be written; an earlier file remains.
    """
    write_checkpoint([path], checkpoint_of(state))


def load_state(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> TrainState:
    """Read and verify a checkpoint as the state that was saved, its tensors on `device`.

    Raises:
        FileNotFoundError, CheckpointError: as `open_checkpoint`.
        ValueError: if its configs are not those of this program.
    """
    return open_checkpoint(path, device).state


def checkpoint_size(checkpoint: Checkpoint) -> int:
    """Return the size of a checkpoint's file in bytes, to within a percent or so."""
    return file_size(payload_of(checkpoint))


def digest_of(checkpoint: Checkpoint) -> str:
    """Return the digest that the file of a checkpoint has."""
    return content_digest(canonical_payload(payload_of(checkpoint)))


def open_checkpoint(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Checkpoint:
    """Read and verify a checkpoint; its parameters go to `device`, all else stays on the CPU.

    Nothing in the file is executed. Checked, in this order, before any tensor is used: the kind
    and size of the file, the layout of the zip, the instructions of the pickle, every CRC, then all
    keys, types, dtypes, shapes, strides and storages, that all is finite, and the digest where
    there is one.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not a good checkpoint, naming the first difference and, where the
            folder has one, a good checkpoint to use instead.
    """
    with _hinting(Path(path)):
        return read_checkpoint(Path(path), device)


def newest_good(
    folder: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """Return the good checkpoint with the most steps in a folder, and the skipped ones.

    Among equals, `latest.pt` is preferred. A `step_*.pt` is not read if a checkpoint with at least
    as many steps has already been found.
    """
    found: Checkpoint | None = None
    skipped = []
    for path in checkpoint_files(Path(folder)):
        promised = step_of_name(path.name)
        if found is not None and promised is not None and promised <= found.step:
            continue
        try:
            checkpoint = read_checkpoint(path, device)
        except (CheckpointError, FileNotFoundError) as error:
            skipped.append((path, str(error)))
            continue
        if found is None or checkpoint.step > found.step:
            found = checkpoint
    return found, skipped


def read_checkpoint(path: Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Open a checkpoint like `open_checkpoint`, but read no other file to suggest it instead.

    This is for reading many files, of which many may be damaged.
    """
    return parse_payload(read_payload(path), path, device)


def parse_payload(
    payload: Payload, path: Path = Path(), device: str | torch.device = "cpu"
) -> Checkpoint:
    """Parse a checked payload; inverse of `payload_of`.

    Raises:
        CheckpointError: if scores, sources, environment or ancestors are not what this program
            writes.
    """
    names = parameter_shapes(ModelConfig(**payload["model_cfg"]))
    return Checkpoint(
        payload["model_cfg"],
        payload["train_cfg"],
        {name: payload["model_state"][name].to(device) for name in names},
        payload["optimizer_state"],
        payload["step"],
        _scores(payload),
        _sources(payload),
        _environment(payload),
        _ancestors(payload),
        payload.get("digest"),
        path,
    )


def payload_of(checkpoint: Checkpoint) -> Payload:
    """Return the dict of the file: pr-06's six keys, and of the others those that say something."""
    c = checkpoint
    scores = c.scores._asdict()
    payload = {
        "model_cfg": c.model_cfg,
        "train_cfg": c.train_cfg,
        "model_state": {**c.params, "lm_head.weight": c.params["tok_emb.weight"]},
        "optimizer_state": c.optimizer_state,
        "step": c.step,
        "best_val_loss": scores.pop("best_val_loss"),
    }
    if c.ancestors:
        payload["ancestors"] = [ancestor._asdict() for ancestor in c.ancestors]
    if c.sources is not None or any(value is not None for value in scores.values()):
        payload["scores"] = scores
    if c.sources is not None:
        payload["sources"] = c.sources
    if c.sources is not None or c.environment:
        payload["environment"] = c.environment
    return payload


@contextlib.contextmanager
def _hinting(path: Path) -> Iterator[None]:
    """Add to an error the path, and a good checkpoint to use instead."""
    try:
        yield
    except CheckpointError as error:
        try:
            found, _ = newest_good(path if path.is_dir() else path.parent)
        except OSError:
            found = None
        hint = f"; the newest good checkpoint here is {found.path.name}" if found else ""
        raise CheckpointError(f"{path}: {error}{hint}") from None


# --- the optimizer state in torch.optim's format -------------------------------------------------


def _optimizer_state(state: TrainState) -> dict[str, Any]:
    """Return `to_modules(state)[1].state_dict()` without copying tensors."""
    names, cfg = parameter_shapes(state.model_cfg), state.train_cfg
    return to_state_dict(
        optimizer_of(cfg),
        state.opt_state,
        names,
        state.step,
        lr=cfg.base_lr,
        weight_decay=cfg.weight_decay,
    )


def _opt_state(
    optimizer_state: Mapping[str, Any] | None, names: list[str], initial: OptState
) -> OptState:
    """Return the state in a state_dict on the device of `initial`; `initial` if there is none."""
    if optimizer_state is None or not optimizer_state["state"]:
        return initial
    ids = names_by_id(optimizer_state["param_groups"], names)
    if len(ids) != len(names):
        raise CheckpointError(
            "the optimizer state does not cover the model's parameters one by one, or has several"
            " groups without names; to resume without it, set optimizer_state to None"
        )
    entries = {name: optimizer_state["state"].get(i, {}) for i, name in ids.items()}
    try:
        found = from_entries(entries, initial)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return map_tensors(lambda zero, t: t.to(zero.device), initial, found)


# --- keys beyond pr-06's six ---------------------------------------------------------------------

# A file of another program may lack them. Anything unexpected under these names is refused, because
# a resume would rely on it.

_STREAM = {"origin": str, "bytes": int, "sha256": str}


def _scores(payload: Payload) -> Scores:
    kept = _table(payload, "scores")
    for name, value in kept.items():
        if value is not None and not isinstance(value, int | float):
            raise CheckpointError(f"scores.{name} is {show(value)}, not a number")
    names = ("best_step", "val_loss", "val_step")
    return Scores(payload["best_val_loss"], *(kept.get(name) for name in names))


def _sources(payload: Payload) -> SourceRecords | None:
    if "sources" not in payload:
        return None
    kept = _table(payload, "sources")
    for split in ("train", "val"):
        streams = _table(kept, split)
        for name in streams:
            stream = _table(streams, name)
            for key, kind in _STREAM.items():
                if not isinstance(stream.get(key), kind):
                    raise CheckpointError(
                        f"sources.{split}.{name}.{key} is {show(stream.get(key))}"
                    )
    return {split: kept.get(split, {}) for split in ("train", "val")}


def _environment(payload: Payload) -> dict[str, Any]:
    kept = _table(payload, "environment")
    threads = kept.get("threads", 1)
    if not isinstance(threads, int) or not 1 <= threads <= 4096:
        raise CheckpointError(f"environment.threads is {show(threads)}")
    return kept


def _ancestors(payload: Payload) -> tuple[Ancestor, ...]:
    kept = payload.get("ancestors", [])
    if not isinstance(kept, list):
        raise CheckpointError(f"ancestors is {show(kept)}, not a list")
    for i, one in enumerate(kept):
        known = isinstance(one, dict) and one.keys() == {*Ancestor._fields}
        if not known or not isinstance(one["digest"], str) or not isinstance(one["step"], int):
            raise CheckpointError(f"ancestors[{i}] is {show(one)}, not a digest and a step")
    return tuple(Ancestor(**one) for one in kept)


def _table(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key, {})
    if not isinstance(value, dict):
        raise CheckpointError(f"{key} is {show(value)}, not a table")
    return value


# --- pr-06's functions ---------------------------------------------------------------------------


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
        CheckpointError: if a value cannot be stored or is not finite.
        OSError: if the file cannot be written; an earlier file remains.
    """
    payload = {
        "model_cfg": model_cfg,
        "train_cfg": train_cfg,
        "model_state": model.state_dict(),
        "optimizer_state": None if optimizer is None else optimizer.state_dict(),
        "step": step,
        "best_val_loss": best_val_loss,
    }
    write_payload([path], payload)


def load_checkpoint(path: str | os.PathLike[str], *, device: str | torch.device) -> Payload:
    """Read and verify a checkpoint as a dict, with its tensors on `device`.

    Raises:
        FileNotFoundError, CheckpointError: as `open_checkpoint`.
    """
    with _hinting(Path(path)):
        payload = read_payload(Path(path))
    moved: Payload = map_tensors(lambda t: t.to(device), payload)
    moved["model_state"]["lm_head.weight"] = moved["model_state"]["tok_emb.weight"]
    return moved


def validate_model_config_match(
    loaded: Mapping[str, Any] | ModelConfig, current: Mapping[str, Any] | ModelConfig
) -> None:
    """Raise ValueError with a line for each model field that differs."""
    a, b = (c if isinstance(c, Mapping) else to_dict(c) for c in (loaded, current))
    missing = "(missing)"
    lines = [
        f"{name}: checkpoint {a.get(name, missing)!r}, config {b.get(name, missing)!r}"
        for name in MODEL_FIELDS
        if a.get(name, missing) != b.get(name, missing)
    ]
    if lines:
        raise Problems("the checkpoint's model differs from the config:", *lines)
