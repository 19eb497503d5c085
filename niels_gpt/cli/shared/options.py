"""Options that several commands share."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from niels_gpt.data.sources import SOURCES, Places, option_of
from niels_gpt.mix import EXAMPLE, parse_mix


class NonEmptyPath(click.Path):
    """A path other than "", which an unset shell variable leaves and means the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse an empty path."""
        if value == "":
            self.fail("the path is empty; is a shell variable unset?", param, ctx)
        return super().convert(value, param, ctx)


PATH = NonEmptyPath(path_type=Path)
CONFIG = NonEmptyPath()  # a str, because a bare name is a config too; the type completes file names
HELP = {"help_option_names": ["-h", "--help"]}

COMMANDLINE = click.core.ParameterSource.COMMANDLINE

Command = Callable[..., Any]
Option = Callable[[Command], Command]


def json_option(text: str = "Print one JSON object.") -> Option:
    """Return a decorator that adds --json, passed as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=text)


def refuse_without_effect(reason: str, *names: str) -> None:
    """Raise a usage error if one of these parameters of the running command was given."""
    ctx = click.get_current_context()
    for param in ctx.command.params:
        if param.name in names and ctx.get_parameter_source(param.name) is COMMANDLINE:
            raise click.UsageError(f"{param.opts[0]} has no effect {reason}")


def device_option(default: str | None = None, *, of_run: bool = False) -> Option:
    """Return a decorator that adds --device; the command gets an available device.

    With `of_run` the default is None, for the device of the run that the command is about.
    """

    def resolve(ctx: click.Context, param: click.Parameter, name: str | None) -> str | None:
        if of_run and name is None:
            return None
        from niels_gpt.device import resolve_device

        try:
            return resolve_device(name)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    usual = "; default that of the run, else cpu" if of_run else "; default mps, else cpu"
    text = "cpu, mps or cuda" + usual * (default is None) + "."
    return click.option(
        "--device", default=default, callback=resolve, metavar="NAME", show_default=True, help=text
    )


def source_options(command: Command) -> Command:
    """Add an option for each source; the command gets the given ones as `places`."""

    @functools.wraps(command)
    def with_places(**given: Any) -> Any:
        named = {name: given.pop(name) for name in SOURCES}
        places = Places({name: place for name, place in named.items() if place})
        places.skip_machine_lines = given.pop("skip_machine_lines")
        places.mix = given.pop("mix", None)
        return command(places=places, **given)

    decorated: Command = click.option(
        "--skip-machine-lines/--keep-machine-lines",
        default=None,
        help="Leave out embedded pictures and the like in notes and text.",
    )(with_places)
    for name, source in reversed(SOURCES.items()):
        option = click.option(
            *dict.fromkeys([option_of(name), f"--{name}"]),
            name,
            type=PATH,
            multiple=source.several,
            metavar=source.metavar,
            help=source.help,
        )
        decorated = option(decorated)
    return decorated


def mix_option(command: Command) -> Command:
    """Add --mix to a command with `source_options`, which gets it as `places.mix`."""

    def parse(ctx: click.Context, param: click.Parameter, text: str | None) -> Any:
        try:
            return None if text is None else parse_mix(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return click.option(
        "--mix",
        callback=parse,
        metavar="NAME=SHARE,...",
        help=f"Shares of the sources, such as {EXAMPLE}.",
    )(command)
