"""The only module that prints: results, messages and a live line; and how commands exit.

Results go to stdout, messages to stderr. A live line is shown on stderr if it is a terminal.
"""

import contextlib
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

import click

from niels_gpt.config import Problems
from niels_gpt.device import share_processors
from niels_gpt.files.strict_json import to_json

TICK = 1.0  # seconds between two looks at a task, so that nothing is silent for three
USER_ERRORS = (ValueError, OSError, RuntimeError, MemoryError)

# Control characters that a terminal would obey (cursor, bell, title) are shown as U+FFFD; in a
# line, so is what would begin another one.
_CONTROLS = dict.fromkeys([*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0)], "\ufffd")
_IN_A_LINE = {**_CONTROLS, **dict.fromkeys([0x0A, 0x2028, 0x2029], "\ufffd")}


class Console:
    """Text on stdout, messages on stderr, and on a terminal a live line."""

    def __init__(self) -> None:
        self._is_line_shown = False
        self._writing = threading.RLock()  # `busy` writes from a thread of its own
        self.last_said = time.monotonic()

    @property
    def is_live(self) -> bool:
        """Whether a live line is visible."""
        return sys.stderr.isatty()

    @property
    def is_read(self) -> bool:
        """Whether stdout can reach anyone: it cannot if it is closed, lost or /dev/null."""
        with contextlib.suppress(OSError):  # a stream of a program is no file
            return not os.path.samestat(os.fstat(sys.stdout.fileno()), os.stat(os.devnull))
        return True

    def write(self, text: str) -> None:
        """Write to stdout and flush, in any encoding."""
        with self._writing:
            self._clear()
            error = _write(text, sys.stdout)
            self.last_said = time.monotonic()
        if error:
            self._lose_stdout(error)

    def say(self, *lines: str) -> None:
        """Print lines on stdout; a file name with a newline in it begins no other line."""
        self.write("".join(f"{line.translate(_IN_A_LINE)}\n" for line in lines))

    def warn(self, *lines: str) -> None:
        """Print lines on stderr, as `say`."""
        with self._writing:
            self._clear()
            _write("".join(f"{line.translate(_IN_A_LINE)}\n" for line in lines), sys.stderr)
            self.last_said = time.monotonic()

    def tell(self, *messages: str) -> None:
        """Print messages for the user on stderr."""
        for message in messages:
            self.warn(f"note: {message}")

    def fail(self, error: BaseException | str, hint: str = "") -> None:
        """Print an error on stderr."""
        first, *others = error.lines if isinstance(error, Problems) else [describe(error)]
        self.warn(f"error: {first}" + f"; {hint}" * bool(hint), *(f"  {line}" for line in others))

    def show(self, line: str) -> None:
        """Replace the live line; the next output removes it.

        The last of its parts, separated by two spaces, are left off if the terminal is too narrow:
        of a line that wraps, only the last row could be removed.
        """
        self.last_said = time.monotonic()
        self.show_again(line)

    def show_again(self, line: str) -> None:
        """Replace the live line, but not as something that is said anew."""
        if self.is_live:
            with self._writing:
                self._clear()
                _write(_fit(line.translate(_IN_A_LINE), _width(sys.stderr) - 1), sys.stderr)
                self._is_line_shown = True

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[Callable[[str], None]]:
        """Show what is being done, and for how long, as the live line while nothing else is said.

        Yields a function that changes what is shown.
        """
        task, done = Task(self, what), threading.Event()
        if not self.is_live:
            yield task.becomes
            return

        def watch() -> None:
            while not done.wait(TICK):
                task.tick()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield task.becomes
        finally:
            done.set()
            watcher.join()
            self._clear()

    def progress(self, what: str) -> Callable[[int, int], None]:
        """Return a function that shows progress as the live line, such as "row 3 of 8"."""
        return lambda done, total: self.show(f"{what} {done:,} of {total:,}")

    def result(self, value: object, lines: Iterable[str], *, as_json: bool) -> None:
        """Print a result: the value as JSON, or the equivalent lines."""
        if as_json:
            self.write(to_json(value) + "\n")
        else:
            self.say(*lines)

    def _clear(self) -> None:
        with self._writing:
            if self._is_line_shown:
                self._is_line_shown = False
                _write("\r\x1b[K", sys.stderr, as_is=True)

    def _lose_stdout(self, error: OSError | ValueError) -> None:
        """Exit with code 0 if the reader has closed the pipe (`| head`), else with 1."""
        if isinstance(error, BrokenPipeError):
            sys.exit(0)
        self.fail(error)
        sys.exit(1)


class Task:
    """What `Console.busy` is about."""

    def __init__(self, console: Console, what: str) -> None:
        self._console, self._what = console, what
        self._start = time.monotonic()

    def becomes(self, what: str) -> None:
        """Go on to something else; the seconds are counted anew."""
        self._what, self._start = what, time.monotonic()

    def tick(self) -> None:
        """Show it if nothing else was said since the last look."""
        now = time.monotonic()
        if now - max(self._start, self._console.last_said) >= TICK:
            self._console.show_again(f"{self._what}  {now - self._start:.0f} s")


class EnduringConsole(Console):
    """Keeps going if stdout cannot be written, because that must not end a training run."""

    @property
    def is_live(self) -> bool:
        """Whether a live line is visible, and the output around it too."""
        return super().is_live and sys.stdout.isatty()

    def _lose_stdout(self, error: OSError | ValueError) -> None:
        pass


console = Console()  # of this process


def _width(stream: TextIO) -> int:
    """Return the columns of a terminal; 80 if it does not tell."""
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns or 80
    return 80


def _fit(line: str, width: int) -> str:
    while len(line) > width and "  " in line:
        line = line.rpartition("  ")[0]
    return line[:width]


def _write(text: str, stream: TextIO, *, as_is: bool = False) -> OSError | ValueError | None:
    """Write and flush, replacing what the encoding lacks; give up the stream on failure."""
    try:
        if stream.isatty() and not as_is:
            text = text.translate(_CONTROLS)
        encoding = stream.encoding or "utf-8"
        stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()
    except (OSError, ValueError) as error:  # ValueError: the stream is closed
        _give_up(stream)
        return error
    return None


def _give_up(stream: TextIO) -> None:
    """Discard all further output to this stream, including its buffer at exit."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


# --- how a command ends ------------------------------------------------------------------------


@contextlib.contextmanager
def process() -> Iterator[None]:
    """Run a command as a process, with usable streams and an exit code.

    Ctrl-C exits with code 130. If click cannot write its output, the code is 0 or 1, as for ours.
    What click prints of the arguments, file names among them, has no control characters.
    """
    _replace_closed_streams()
    # Torch warns on import if NumPy is missing; it is not needed here.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    # Torch's own forward mode warns of what torch itself uses.
    warnings.filterwarnings("ignore", message="`torch.jit.script` is ")
    warnings.filterwarnings("ignore", module=r"torch(\.|$)")  # about how we call it, not for users
    try:
        yield
    except KeyboardInterrupt:
        console.warn("")
        sys.exit(130)
    except click.ClickException as error:
        error.message = error.message.translate(_IN_A_LINE)  # type: ignore[misc]
        raise
    except OSError as error:
        _give_up(sys.stdout)
        console._lose_stdout(error)


class Script(click.Command):
    """A command that can be run by itself: all that it does is done as a process."""

    def main(self, *args: Any, **more: Any) -> Any:
        """Do it all, the completion of a shell included."""
        share_processors()
        with process():
            return super().main(*args, **more)

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        """Parse the arguments, which may print the help."""
        with process():
            return super().make_context(*args, **more)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with process():
            return super().invoke(ctx)


@contextlib.contextmanager
def exit_on_failure(code: int, *, busy: str = "") -> Iterator[None]:
    """Exit with `code` and one message on stderr if the block fails; say what it is busy with."""
    try:
        with console.busy(busy) if busy else contextlib.nullcontext():
            yield
    except USER_ERRORS as error:
        console.fail(error)
        sys.exit(code)


def describe(error: BaseException | str) -> str:
    """Return the message of an error; for a system error with its path and errno."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror} (errno {error.errno})"
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}".removesuffix(": ")
    return str(error)


def _replace_closed_streams() -> None:
    """Connect streams that were closed from the start to /dev/null.

    Otherwise a file opened later could become stdout or stderr and receive other output.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # the lowest free number
