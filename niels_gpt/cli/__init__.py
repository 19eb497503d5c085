"""The `niels-gpt` command: a group of thin commands, each imported when it is needed."""

import errno
import io
import platform
import sys
import warnings
from importlib import import_module
from typing import Any

import click

from niels_gpt import __version__
from niels_gpt.failures import describe
from niels_gpt.terminal import give_up

COMMANDS = {
    "train": "niels_gpt.train:main",
    "sample": "niels_gpt.cli.sample:main",
    "chat": "niels_gpt.cli.chat:main",
    "sweep": "niels_gpt.cli.sweep:main",
    "replay": "niels_gpt.cli.replay:main",
    "inspect": "niels_gpt.cli.inspect:main",
    "evaluate": "niels_gpt.cli.evaluate:main",
    "plot": "niels_gpt.cli.plot:main",
    "data": "niels_gpt.cli.data:main",
    "config": "niels_gpt.cli.config:main",
    "checkpoint": "niels_gpt.cli.checkpoint:main",
}


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names, in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; where its output cannot be written (a full disk), say so with code 1."""
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.errno == errno.EPIPE:  # `| head`, which click knows
                raise
            give_up(sys.stdout)
            click.echo(f"error: {describe(error)}", err=True)
            ctx.exit(1)


def _show_version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    """Print the versions and the device that decide what a run computes."""
    if not wanted or ctx.resilient_parsing:
        return
    _silence_missing_numpy()
    import torch

    from niels_gpt.device import get_device

    python = platform.python_version()
    click.echo(
        f"niels-gpt {__version__}, torch {torch.__version__}, Python {python}, "
        f"device {get_device()}"
    )
    ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the versions and the device.",
)
def main() -> None:
    """Train a small byte-level GPT on your own text, and use it."""
    _silence_missing_numpy()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # file names need not be text, nor stdout UTF-8


def _silence_missing_numpy() -> None:
    """Torch says on import that NumPy is not there; it has no use for it here."""
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
