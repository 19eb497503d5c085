"""The table of sources: each source of text is one entry here and a reader in this folder."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from niels_gpt.data import primer, roam, wiki
from niels_gpt.data.recipe import Reading, Recipe


class Source(NamedTuple):
    """A source of text; its key is its name in configs and in the option `--NAME`."""

    metavar: str  # of the option
    help: str
    recipes: Callable[[Reading], Sequence[Recipe]]  # the first available one is used
    must_be: str = ""  # a named place must be a "folder" or "file"; "": the reader checks


SOURCES = {
    "wiki": Source("DIR", "Folder with train.txt and val.txt.", wiki.recipes),
    "roam": Source("DIR", "Folder of markdown notes.", roam.recipes, must_be="folder"),
    "primer": Source("FILE", "Chat primer.", primer.recipes, must_be="file"),
}


def check_place(name: str, place: str | Path) -> None:
    """Raise FileNotFoundError if the place that the user named for a source does not exist."""
    exists = {"folder": Path.is_dir, "file": Path.is_file}
    kind = SOURCES[name].must_be
    if kind and not exists[kind](Path(place)):
        raise FileNotFoundError(f"--{name} {place}: no such {kind}")
