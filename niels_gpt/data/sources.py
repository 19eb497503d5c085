"""The table of sources: each source of text is one entry here and a reader in this folder."""

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from niels_gpt.data import documents, primer, roam, wiki
from niels_gpt.data.recipe import Reading, Recipe


class Source(NamedTuple):
    """A source of text; its key is its name in configs, and that of its option if not `option`."""

    metavar: str  # of the option
    help: str
    recipes: Callable[[Reading], Iterable[Recipe]]  # the first available one is used
    must_be: str = ""  # a named place must be a "folder" or "file"; "": either
    option: str = ""
    several: bool = False  # whether the option may be given more than once


SOURCES = {
    "wiki": Source("DIR", "Folder with train.txt and val.txt.", wiki.recipes, must_be="folder"),
    "roam": Source(
        "DIR", "Folder of markdown notes.", roam.recipes, must_be="folder", option="notes"
    ),
    "primer": Source("FILE", "Chat primer.", primer.recipes, must_be="file"),
    "text": Source("FILE|DIR", "Any UTF-8 text; repeatable.", documents.recipes, several=True),
}

Place = str | Path | tuple[str | Path, ...]  # a tuple if the source takes several


@dataclass(frozen=True)
class Given:
    """What the user says of the text; what is not given is left to the program."""

    places: Mapping[str, Place] = field(default_factory=dict)  # by source
    mix: Mapping[str, float] | None = None  # share of each source, summing to 1
    skip_machine_lines: bool | None = None  # see `StreamBuildConfig`


def option_of(name: str) -> str:
    """Return the documented option of a source."""
    return f"--{SOURCES[name].option or name}"


def all_places(place: Place) -> tuple[str | Path, ...]:
    """Return the one or the several places of a source."""
    return place if isinstance(place, tuple) else (place,)


def check_place(name: str, place: str | Path) -> None:
    """Raise OSError if a place that the user named for a source is absent or of another kind."""
    source, option = SOURCES[name], option_of(name)
    try:
        mode = os.stat(place).st_mode
    except FileNotFoundError:
        wanted = source.must_be or "file or folder"
        raise FileNotFoundError(f"{option} {place}: no such {wanted}") from None
    kind = "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special file"
    if kind == (source.must_be or kind) != "special file":
        return
    wanted = source.help[0].lower() + source.help[1:].rstrip(".")
    wanted = f"a {wanted}" if source.must_be else "a file or a folder"
    raise OSError(f"{option} {place}: this is a {kind}; it must be {wanted}")
