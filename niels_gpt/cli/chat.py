"""The `chat` command: a conversation with a model."""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from niels_gpt.cli.shared.generation import Generation, generation_options
from niels_gpt.cli.shared.options import HELP
from niels_gpt.cli.shared.output import console, exit_on_failure
from niels_gpt.cli.shared.program import this_program

ASK = "> "
GREETING = "/help lists the commands, Ctrl-D ends"


@click.command(
    context_settings={**HELP, "show_default": True},
    epilog="Example: niels-gpt chat --system 'You are a kind teacher.'",
)
@click.option("--message", metavar="TEXT", help="Send this, print the reply and exit.")
@click.option("--system", metavar="TEXT", help="System message.")
@generation_options
def main(message: str | None, system: str | None, generation: Generation) -> None:
    """Talk with a model; /help lists the commands, Ctrl-D ends, Ctrl-C stops a reply.

    Replies go to stdout, everything else to stderr. The same lines with the same seed get the same
    replies.
    """
    with exit_on_failure(2):
        from niels_gpt.inference.chat import (
            Voice,
            answer,
            converse,
            first_note,
            knows_dialogues,
            new_chat,
        )

        trained, sampling = generation.prepare()
        voice = Voice(trained.params, trained.cfg, sampling, generation.max_bytes)
        chat = new_chat(system and _whole(system), generation.seed)
        if not knows_dialogues(trained):
            console.tell(f"trained without dialogues, it will hardly answer; {_how(trained.path)}")
    with exit_on_failure(1):
        if message is not None:
            answer(voice, chat, _whole(message), console.write, console.tell)
        elif sys.stdin.isatty() and sys.stdout.isatty():
            console.tell(GREETING, *filter(None, [first_note(voice, chat)]))
            converse(voice, chat, _typed(), console.write, console.tell, can_stop=True)
        else:
            converse(voice, chat, _piped(), console.write, console.tell)


def _how(path: Path) -> str:
    """Return the command that teaches a model to chat."""
    words = ["--config", "chat", "--from", str(path), "--out", str(path.parent / "chat")]
    return f"to teach it: {shlex.join([*this_program().train, *words])}"


def _whole(argument: str) -> str:
    """Return an argument as text; invalid UTF-8 becomes U+FFFD."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _piped() -> Iterator[str]:
    """Yield the lines of stdin, in which what is not UTF-8 becomes U+FFFD."""
    _replace_invalid()
    yield from sys.stdin


def _typed() -> Iterator[str]:
    """Yield the lines that a person types, with editing and history, until Ctrl-D."""
    _replace_invalid()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() editing and history
    with contextlib.suppress(EOFError):
        while True:
            yield input(ASK)
    console.warn("")


def _replace_invalid() -> None:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
