"""The options of the `train` command, as a value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from niels_gpt.data.sources import Place, Places


@dataclass(frozen=True)
class TrainOptions:
    """One field per option of `train`; None means the default."""

    config: str
    overrides: tuple[str, ...] = ()
    resume: str | None = None
    parent: str | None = None  # `--from`, the checkpoint whose weights the run starts from
    device: str | None = None
    out: Path | None = None
    places: Mapping[str, Place] = field(default_factory=Places)  # of sources, by name
    compile: bool | None = None
    dry_run: bool = False
    as_json: bool = False
    allow_data_change: bool = False
    sample: bool = True  # print a short text by the model at the end
    sample_every_eval: bool = False
