"""The `config` commands: show a resolved config."""

import textwrap
from pathlib import Path

import click

from niels_gpt.analysis.config_report import DEFAULT, OVERRIDE, Setting, resolve
from niels_gpt.cli.shared.options import CONFIG, HELP, Commands, json_option, set_option
from niels_gpt.cli.shared.output import console, exit_on_failure
from niels_gpt.config import find_config

WIDTH = 80  # columns


@click.group(cls=Commands, context_settings=HELP)
def main() -> None:
    """Show a resolved config."""


@main.command(
    epilog="Example: niels-gpt config show --config smoke --set train.B=16",
)
@click.option(
    "--config",
    type=CONFIG,
    metavar="FILE",
    help="JSON config, or a bare name (default: only defaults).",
)
@set_option
@json_option()
def show(config: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show every value of a config and where it comes from.

    The origin is the default, the file, or --set. With --json, the field `config` is a complete
    config that can be saved as a file.
    """
    with exit_on_failure(2):
        settings, resolved = resolve(None if config is None else find_config(config), overrides)
    value = {"config": resolved, "from": {s.key: s.origin for s in settings}}
    console.result(value, _lines(settings), as_json=as_json)


def _lines(settings: list[Setting]) -> list[str]:
    """Return a table of 80 columns; a meaning that is longer goes on below itself."""
    rows = [("key", "value", "from", "meaning"), *(_row(s) for s in settings)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    left = sum(widths) + 2 * len(widths)
    lines = []
    for *cells, meaning in rows:
        first = "".join(f"{cell:<{w}}  " for cell, w in zip(cells, widths, strict=True))
        for part in textwrap.wrap(meaning, max(20, WIDTH - left)):
            lines.append(first + part)
            first = " " * left
    files = {s.origin for s in settings} - {DEFAULT, OVERRIDE}
    return [*lines, *(f"{Path(file).name} is {file}" for file in files if Path(file).name != file)]


def _row(s: Setting) -> tuple[str, str, str, str]:
    changed = s.default is not None and s.value != s.default
    origin = s.origin if s.origin in (DEFAULT, OVERRIDE) else Path(s.origin).name
    return s.key, str(s.value), origin, s.meaning + f" (default {s.default})" * changed
