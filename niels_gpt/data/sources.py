"""The table of sources: each source of text is one entry here and a reader in this folder."""

import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from niels_gpt.data import primer, roam, wiki
from niels_gpt.data.recipe import Reading, Recipe


class Source(NamedTuple):
    """A source of text; its key is its name in configs and in the option `--NAME`."""

    metavar: str  # of the option
    help: str
    recipes: Callable[[Reading], Iterable[Recipe]]  # the first available one is used
    must_be: str = ""  # a named place must be a "folder" or "file"; "": the reader checks


SOURCES = {
    "wiki": Source("DIR", "Folder with train.txt and val.txt.", wiki.recipes, must_be="folder"),
    "roam": Source("DIR", "Folder of markdown notes.", roam.recipes, must_be="folder"),
    "primer": Source("FILE", "Chat primer.", primer.recipes, must_be="file"),
}


class Places(dict[str, Path]):
    """The place given for each source, by name, and how to read the text there."""

    skip_machine_lines: bool | None = None  # see `StreamBuildConfig`


def check_place(name: str, place: str | Path) -> None:
    """Raise OSError if the place that the user named for a source is absent or of another kind."""
    source = SOURCES[name]
    if not source.must_be:
        return
    try:
        mode = os.stat(place).st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"--{name} {place}: no such {source.must_be}") from None
    kind = "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special file"
    if kind != source.must_be:
        wanted = source.help[0].lower() + source.help[1:].rstrip(".")
        raise OSError(f"--{name} {place}: this is a {kind}; it must be a {wanted}")
