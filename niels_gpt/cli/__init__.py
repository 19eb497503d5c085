"""The `niels-gpt` command. Each module in this folder is a command and defines `main`."""

import platform
from importlib import import_module
from pkgutil import iter_modules

import click

from niels_gpt import __version__
from niels_gpt.cli.shared.options import HELP, Commands
from niels_gpt.cli.shared.output import Script, console


class Modules(Script, Commands):
    """A group whose commands are the modules of this folder, imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the modules; folders hold shared code."""
        return [module.name for module in iter_modules(__path__) if not module.ispkg]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = import_module(f"{__name__}.{cmd_name}").main
        return command


@click.group(
    cls=Modules,
    context_settings=HELP,
    invoke_without_command=True,
    no_args_is_help=True,
    subcommand_metavar="COMMAND [ARGS]...",
)
@click.option("--version", is_flag=True, help="Show versions and the device.")
@click.pass_context
def main(ctx: click.Context, version: bool) -> None:
    """Train a small byte-level GPT on your own text, and use it."""
    if version:
        console.say(_versions())
        ctx.exit()


def _versions() -> str:
    """Return the versions and the device, which determine the bits of a run."""
    import torch

    from niels_gpt.device import get_device

    python, device = platform.python_version(), get_device()
    return f"niels-gpt {__version__}, torch {torch.__version__}, Python {python}, device {device}"
