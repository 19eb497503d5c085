"""The options of the `train` command, as a value."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from niels_gpt.data.sources import Given


class Program(NamedTuple):
    """The words that call this program, for commands that it prints."""

    base: tuple[str, ...] = ("niels-gpt",)  # before the name of a command
    train: tuple[str, ...] = ("niels-gpt", "train")


@dataclass(frozen=True)
class TrainOptions:
    """One field per option of `train`; None means the default."""

    config: str | None  # None on a resume: as in the checkpoint
    overrides: tuple[str, ...] = ()
    resume: str | None = None
    parent: str | None = None  # `--from`, the checkpoint whose weights the run starts from
    device: str | None = None
    out: Path | None = None
    given: Given = field(default_factory=Given)  # of the text
    compile: bool | None = None
    dry_run: bool = False
    as_json: bool = False
    allow_data_change: bool = False
    sample: bool = True  # print a short text by the model at the end
    sample_every_eval: bool = False
    program: Program = field(default_factory=Program)
