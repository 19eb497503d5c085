"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)
CONFIG = click.Path()  # a str: a bare name means a config too; the type completes file names
HELP = {"help_option_names": ["-h", "--help"]}

Command = Callable[..., Any]


def source_options(command: Command) -> Command:
    """Add --wiki, --roam and --primer, which say where the text lies."""
    for option in (
        click.option("--primer", type=PATH, metavar="FILE", help="Chat primer."),
        click.option("--roam", type=PATH, metavar="DIR", help="Folder of markdown notes."),
        click.option("--wiki", type=PATH, metavar="DIR", help="Folder with train.txt, val.txt."),
    ):
        command = option(command)
    return command
