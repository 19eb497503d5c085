"""What a run says: lines on stdout, warnings on stderr, a live line where somebody watches.

A reader that goes away (`| head`) or a full disk behind a log must not end a training, so that a
stream that cannot be written is given up.
"""

import os
import sys
from typing import TextIO

import click

from niels_gpt.terminal import give_up


class Console:
    """Lines to stdout and stderr, and on a terminal one line that replaces itself."""

    def __init__(self) -> None:
        _fill_closed_descriptors()
        self.is_live = sys.stdout is not None and sys.stdout.isatty()
        self._live = ""

    def say(self, line: str) -> None:
        """Print a line on stdout."""
        self._clear()
        _write(line + "\n", sys.stdout)

    def warn(self, line: str) -> None:
        """Print a line on stderr."""
        self._clear()
        _write(line + "\n", sys.stderr)

    def show(self, line: str) -> None:
        """Replace the live line; only a terminal sees it."""
        if self.is_live:
            self._clear()
            self._live = line
            _write(line, sys.stdout)

    def _clear(self) -> None:
        if self._live:
            self._live = ""
            _write("\r\x1b[K", sys.stdout)


def _write(text: str, stream: TextIO | None) -> None:
    """Write what the stream's encoding has; None is a stream that was closed from the start."""
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    try:
        click.echo(text.encode(encoding, "replace").decode(encoding), file=stream, nl=False)
    except (OSError, ValueError):  # ValueError: the stream is closed
        give_up(stream)


def _fill_closed_descriptors() -> None:
    """Keep a file that is opened later from becoming stdout or stderr, where others write."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
