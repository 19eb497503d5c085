"""Text that comes to stdout piece by piece, and how that ends."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

import click

# A terminal would obey these (move the cursor, ring, change its title): it is shown U+FFFD instead.
_CONTROLS = dict.fromkeys([*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0)], "\ufffd")


def write(text: str) -> None:
    """Write to stdout at once, whatever its encoding.

    Where the reader has gone (`| head`) it has what it wanted: the process ends with code 0.
    """
    if sys.stdout.isatty():
        text = text.translate(_CONTROLS)
    encoding = sys.stdout.encoding or "utf-8"
    try:
        click.echo(text.encode(encoding, "replace").decode(encoding), nl=False)
    except BrokenPipeError:
        give_up(sys.stdout)
        sys.exit(0)


def give_up(stream: TextIO) -> None:
    """Let what is still written to this stream vanish, also what its buffer holds at exit."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def note(text: str) -> None:
    """Tell the user something on stderr."""
    click.echo(f"note: {text}", err=True)


@contextlib.contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """End the process with code 130 on Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(err=True)
        sys.exit(130)
