"""Options that several commands share."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)
CONFIG = click.Path()  # a str: a bare name means a config too; the type completes file names
HELP = {"help_option_names": ["-h", "--help"]}

Command = Callable[..., Any]
Places = dict[str, Path]  # where the user says that a source lies, by its name


def source_options(command: Command) -> Command:
    """Add --wiki, --roam and --primer; the command gets those that are given as `places`."""

    @functools.wraps(command)
    def with_places(**given: Any) -> Any:
        named = {name: given.pop(name) for name in _SOURCES}
        places: Places = {name: place for name, place in named.items() if place is not None}
        return command(places=places, **given)

    decorated: Command = with_places
    for name, (metavar, text) in reversed(_SOURCES.items()):
        decorated = click.option(f"--{name}", type=PATH, metavar=metavar, help=text)(decorated)
    return decorated


_SOURCES = {
    "wiki": ("DIR", "Folder with train.txt and val.txt."),
    "roam": ("DIR", "Folder of markdown notes."),
    "primer": ("FILE", "Chat primer."),
}
