"""Where a run begins: at nothing, at a checkpoint, or with the weights of one."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from niels_gpt import paths
from niels_gpt.checkpoint import Ancestor, Checkpoint, newest_good, open_checkpoint
from niels_gpt.config import (
    ConfigDocument,
    ModelConfig,
    Problems,
    TrainConfig,
    apply_overrides,
    config_from_dict,
    to_dict,
)
from niels_gpt.device import resolve_device
from niels_gpt.files.names import BEST
from niels_gpt.run.call import Call, read_call
from niels_gpt.run.options import TrainOptions
from niels_gpt.state import TrainState, make_state


class Origin(NamedTuple):
    """The checkpoint of `--resume` or that of `--from`; neither if the run starts from nothing."""

    resumed: Checkpoint | None = None
    parent: Checkpoint | None = None
    skipped: tuple[str, ...] = ()  # a line for each damaged checkpoint that `latest` passed over

    @property
    def ancestors(self) -> tuple[Ancestor, ...]:
        """Return where the first weights of the run come from."""
        if self.parent is not None:
            return self.parent.lineage
        return self.resumed.ancestors if self.resumed is not None else ()

    def configs(
        self, document: ConfigDocument | None, overrides: Sequence[str]
    ) -> tuple[ModelConfig, TrainConfig]:
        """Return the configs of the run, with the overrides.

        Without a file they are those of the resumed checkpoint. With the weights of another, what
        the file does not say of the model is as in that checkpoint.

        Raises:
            ValueError: if they are invalid, with every problem.
        """
        if document is not None:
            model = {} if self.parent is None else self.parent.model_cfg
            return document.configs(overrides, model=model)
        assert self.resumed is not None
        return _configs_in(self.resumed, overrides)

    def device(self, asked: str | None) -> str:
        """Return the device to train on: as asked, else that of the run that is resumed.

        Raises:
            ValueError: if the one that was asked for is not available.
        """
        if asked is None and self.resumed is not None:
            before = self.resumed.environment.get("device")
            with contextlib.suppress(ValueError):
                return resolve_device(before if before is None else str(before))
        return resolve_device(asked)

    def state(self, model_cfg: ModelConfig, train_cfg: TrainConfig, device: str) -> TrainState:
        """Return the state with which the run begins.

        Raises:
            ValueError: if the checkpoint's model, optimizer or step does not suit the configs.
        """
        if self.parent is not None:
            with _advising("a config without a model section takes the model of the checkpoint"):
                return self.parent.on(device).start_under(model_cfg, train_cfg)
        if self.resumed is None:
            return make_state(model_cfg, train_cfg, device)
        with _advising("without --config and --set model... a resume takes that of the checkpoint"):
            state = self.resumed.on(device).state_under(model_cfg, train_cfg)
        _refuse_beyond_the_end(self.resumed, train_cfg)
        return state

    def messages(self, train_cfg: TrainConfig) -> list[str]:
        """Return what the user should know of it."""
        if self.parent is not None:
            shape = ", ".join(f"{name} {value}" for name, value in to_dict(self.parent.cfg).items())
            return [
                f"starting from the weights of {self.parent.path} after step {self.parent.step:,}, "
                f"a model of {shape}"
            ]
        if self.resumed is None:
            return []
        return [*self.skipped, *_resume_messages(self.resumed, train_cfg)]

    def read_call(self) -> tuple[Call, list[str]]:
        """Return how the run that is resumed was called, and messages."""
        return (Call(), []) if self.resumed is None else read_call(self.resumed.path.parent)


def find_origin(options: TrainOptions) -> Origin:
    """Open the checkpoint that the options name, if they name one.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it is invalid.
    """
    if options.parent is not None:
        return Origin(parent=open_checkpoint(options.parent))
    if options.resume is None:
        return Origin()
    if options.resume == "latest":
        return _newest(output_folder(options))
    return Origin(resumed=open_checkpoint(options.resume))


def check_origin(options: TrainOptions) -> None:
    """Raise OSError or ValueError if the options name no file as the checkpoint."""
    folder = output_folder(options)
    if options.resume == "latest":
        if not folder.is_dir():
            raise FileNotFoundError(f"--resume latest: folder not found: {folder}")
    elif options.resume is not None:
        latest = f"use --resume latest --out {options.resume} for the newest good checkpoint in it"
        _check_is_file("--resume", options.resume, latest)
    if options.parent is not None:
        _check_is_file("--from", options.parent, f"name a checkpoint in it, such as {BEST}")


def output_folder(options: TrainOptions) -> Path:
    """Return the output folder: as given, else that of the checkpoint to resume."""
    if options.out is not None:
        return options.out
    if options.resume in (None, "latest"):
        return paths.CHECKPOINT_DIR
    return Path(options.resume).parent


def _configs_in(resumed: Checkpoint, overrides: Sequence[str]) -> tuple[ModelConfig, TrainConfig]:
    where = " ".join([f"the configs in {resumed.path}", *(f"--set {o}" for o in overrides)])
    doc = {"model": resumed.model_cfg, "train": resumed.train_cfg}
    try:
        return config_from_dict(apply_overrides(doc, overrides), where=where, from_file=True)
    except ValueError as error:
        problems = error.lines if isinstance(error, Problems) else (str(error),)
        raise Problems(*problems, "--config FILE gives others") from None


@contextlib.contextmanager
def _advising(what: str) -> Iterator[None]:
    """Add what to do to an error of several lines."""
    try:
        yield
    except Problems as error:
        raise Problems(*error.lines, what) from None


def _check_is_file(option: str, name: str, instead: str) -> None:
    if not os.path.exists(name):
        raise FileNotFoundError(f"{option} {name}: no such checkpoint")
    if os.path.isdir(name):
        raise ValueError(f"{option} {name}: is a folder; {instead}")


def _newest(folder: Path) -> Origin:
    """Open the newest good checkpoint of a folder."""
    found, skipped = newest_good(folder)
    if found is None:
        why = "".join(f"; {path.name}: {reason}" for path, reason in skipped)
        raise FileNotFoundError(f"--resume latest: no good checkpoint in {folder}{why}")
    return Origin(resumed=found, skipped=tuple(f"{p}: skipped, {why}" for p, why in skipped))


def _resume_messages(resumed: Checkpoint, train_cfg: TrainConfig) -> list[str]:
    """Return messages about inexact resumption and changed settings."""
    defaults, now = to_dict(TrainConfig()), to_dict(train_cfg)
    before = {**defaults, **resumed.train_cfg}
    changed = [
        f"train.{name}: {before[name]!r} in the checkpoint, now {now[name]!r}"
        for name in now
        if before[name] != now[name]
    ]
    return [*(f"{resumed.path}: {message}" for message in resumed.messages), *changed]


def _refuse_beyond_the_end(resumed: Checkpoint, cfg: TrainConfig) -> None:
    if resumed.step > cfg.total_steps:
        raise ValueError(
            f"{resumed.path}: has finished {resumed.step} steps, but train.total_steps is "
            f"{cfg.total_steps}: set it to more than {resumed.step}, "
            "or resume from an earlier checkpoint"
        )
