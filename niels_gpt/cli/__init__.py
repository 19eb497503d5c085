"""The `niels-gpt` command. Each module of this folder is one of its commands: it defines `main`."""

import errno
import io
import platform
import sys
import warnings
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import click

from niels_gpt import __version__
from niels_gpt.failures import describe
from niels_gpt.terminal import give_up


class Commands(click.Group):
    """A group whose commands are the modules of this folder, imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the modules; folders hold what the commands share."""
        return [module.name for module in iter_modules(__path__) if not module.ispkg]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = import_module(f"{__name__}.{cmd_name}").main
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


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
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
