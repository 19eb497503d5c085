"""Options that several commands share."""

import functools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from niels_gpt import paths
from niels_gpt.cli.shared.output import console
from niels_gpt.config import SECTIONS, known_configs, nearest
from niels_gpt.data.sources import SOURCES, Given, option_of
from niels_gpt.files.names import TRAIN_FIRST, model_in
from niels_gpt.mix import EXAMPLE, parse_mix


class NonEmptyPath(click.Path):
    """A path other than "", which an unset shell variable leaves and means the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse an empty path."""
        if value == "":
            self.fail("the path is empty; is a shell variable unset?", param, ctx)
        return super().convert(value, param, ctx)


class ConfigFile(NonEmptyPath):
    """A config file or the name of a config; both are completed."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete file names (first: the shell forgets what comes before them) and names."""
        names = [name for name in known_configs() if name.startswith(incomplete)]
        return [*super().shell_complete(ctx, param, incomplete), *map(CompletionItem, names)]


class Override(click.types.StringParamType):
    """A `--set` argument, of which the key is completed."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete SECTION.KEY=."""
        keys = (f"{section}.{f.name}=" for section, cls in SECTIONS.items() for f in fields(cls))
        return [CompletionItem(key) for key in keys if key.startswith(incomplete)]


class Commands(click.Group):
    """A group that suggests the nearest name for an unknown command."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the command."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            hint = nearest(args[0], self.list_commands(ctx))
            raise click.UsageError(f"No such command {args[0]!r} ({hint})", ctx) from error


PATH = NonEmptyPath(path_type=Path)
FILE = NonEmptyPath()  # a str, because a word may be meant
CONFIG = ConfigFile()
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


def set_option(command: Command) -> Command:
    """Add --set to a command, which gets them as `overrides`."""
    return click.option(
        "--set",
        "overrides",
        type=Override(),
        multiple=True,
        metavar="KEY=VALUE",
        help="E.g. train.B=16.",
    )(command)


def device_option(default: str | None = None, *, of_run: bool = False) -> Option:
    """Return a decorator that adds --device to a command that computes.

    The command gets an available device, and no more threads than there are processors. With
    `of_run` the default is None, for the device of the run that the command is about.
    """

    def resolve(ctx: click.Context, param: click.Parameter, name: str | None) -> str | None:
        if ctx.resilient_parsing:  # for completion
            return name
        from niels_gpt.device import limit_threads, resolve_device

        limit_threads()
        if of_run and name is None:
            return None
        try:
            return resolve_device(name)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    usual = "; default that of the run, else cpu" if of_run else "; default mps, else cpu"
    text = "cpu, mps or cuda" + usual * (default is None) + "."
    return click.option(
        "--device", default=default, callback=resolve, metavar="NAME", show_default=True, help=text
    )


def ckpt_option(command: Command) -> Command:
    """Add --ckpt to a command, which gets the checkpoint that is meant: a file."""

    def find(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
        if ctx.resilient_parsing:
            return None
        try:
            found = model_in(path or paths.CHECKPOINT_DIR)
            if path is None and not found.exists():
                raise FileNotFoundError(f"{found}: no such folder; {TRAIN_FIRST}")
        except OSError as error:
            raise click.BadParameter(str(error)) from None
        if found != path:
            console.tell(f"using {found}")
        return found

    return click.option(
        "--ckpt",
        type=PATH,
        callback=find,
        metavar="PATH",
        help="Checkpoint, or folder of a run; default checkpoints/.",
    )(command)


def source_options(command: Command) -> Command:
    """Add an option for each source; the command gets what is given of the text as `given`."""

    @functools.wraps(command)
    def with_given(**options: Any) -> Any:
        places = {name: options.pop(name) for name in SOURCES}
        given = Given(
            {name: place for name, place in places.items() if place},
            options.pop("mix", None),
            options.pop("skip_machine_lines"),
        )
        return command(given=given, **options)

    decorated: Command = click.option(
        "--skip-machine-lines/--keep-machine-lines",
        default=None,
        help="Leave out embedded pictures and the like in notes and text.",
    )(with_given)
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
    """Add --mix to a command with `source_options`, which gets it as `given.mix`."""

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
