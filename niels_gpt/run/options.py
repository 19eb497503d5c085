"""What a user asks of the `train` command, as a value."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainOptions:
    """One field per option of `train`; None stands for the option's default."""

    config: str
    overrides: tuple[str, ...] = ()
    resume: str | None = None
    device: str | None = None
    out: Path | None = None
    wiki: Path | None = None
    roam: Path | None = None
    primer: Path | None = None
    compile: bool | None = None
    dry_run: bool = False
    as_json: bool = False
    allow_data_change: bool = False
