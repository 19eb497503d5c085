"""The table of sources: a source of text is one entry here, and a reader beside this file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from niels_gpt.data import primer, roam, wiki
from niels_gpt.data.recipe import Reading, Recipe


class Source(NamedTuple):
    """A source of text, under the name that configs and the option `--NAME` call it by."""

    metavar: str  # of the option
    help: str
    recipes: Callable[[Reading], Sequence[Recipe]]  # in order: the first that is available serves
    must_be: str = ""  # a place that is named must be a "folder" or "file"; "": the reader says


SOURCES = {
    "wiki": Source("DIR", "Folder with train.txt and val.txt.", wiki.recipes),
    "roam": Source("DIR", "Folder of markdown notes.", roam.recipes, must_be="folder"),
    "primer": Source("FILE", "Chat primer.", primer.recipes, must_be="file"),
}


def check_place(name: str, place: str | Path) -> None:
    """Raise FileNotFoundError where the place that the user named for a source is not there."""
    exists = {"folder": Path.is_dir, "file": Path.is_file}
    kind = SOURCES[name].must_be
    if kind and not exists[kind](Path(place)):
        raise FileNotFoundError(f"--{name} {place}: no such {kind}")
