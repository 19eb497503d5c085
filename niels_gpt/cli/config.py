"""The `config` commands: show a resolved config."""

import click

from niels_gpt.analysis.config_report import Setting, resolve
from niels_gpt.cli.shared.options import CONFIG, HELP, json_option
from niels_gpt.cli.shared.output import console, exit_on_failure
from niels_gpt.config import find_config


@click.group(context_settings=HELP)
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
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="E.g. train.B=16.")
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
    rows = [("key", "value", "from", "meaning"), *(_row(s) for s in settings)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]


def _row(s: Setting) -> tuple[str, str, str, str]:
    changed = s.default is not None and s.value != s.default
    return s.key, str(s.value), s.origin, s.meaning + f" (default {s.default})" * changed
