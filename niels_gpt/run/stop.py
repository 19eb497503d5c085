"""Ctrl-C, SIGTERM and SIGHUP as an exception raised only where it is safe.

The first signal is recorded, and raised as `Stopped` by the next `check()`, or at once inside
`immediately()`. Further signals change nothing, because they need not be anyone's wish: closing a
terminal sends SIGHUP twice within a millisecond, from the shell and from the kernel. Only a person
who presses Ctrl-C again, `PATIENCE` seconds after the first signal or later, ends the process at
once; files are complete at every moment, so nothing that was saved is lost.
"""

import atexit
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 1.0  # seconds


class Stopped(BaseException):
    """The user asked the run to stop. Not an `Exception`, so that no library swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.exit_code = 128 + signum


class Stop:
    """Turns the first signal into `Stopped` while it is active."""

    def __init__(self) -> None:
        self._signum: int | None = None
        self._since = 0.0  # when the first signal arrived
        self._immediate = False

    @contextlib.contextmanager
    def active(self) -> Iterator["Stop"]:
        """Handle the signals inside. Outside Python's main thread this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        # Respect nohup.
        _set_handlers({n: self._handle for n in SIGNALS if before[n] is not signal.SIG_IGN})
        try:
            yield self
        finally:
            if self._signum is None:
                _set_handlers(before)
            else:
                _ignore_while_ending(before)

    def check(self) -> None:
        """Raise `Stopped` if a signal has arrived."""
        if self._signum is not None:
            raise Stopped(self._signum)

    @contextlib.contextmanager
    def immediately(self) -> Iterator[None]:
        """Let a signal raise `Stopped` at any point inside; the code inside must tolerate that.

        `Stopped` is raised at the end where the code inside swallows it, or turns it into an error.
        """
        self._immediate = True
        try:
            self.check()
            yield
        except Exception:
            self.check()
            raise
        finally:
            self._immediate = False
        self.check()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None:
            if signum == signal.SIGINT and time.monotonic() - self._since > PATIENCE:
                os._exit(128 + signum)
            return
        self._since, self._signum = time.monotonic(), signum
        if self._immediate:
            raise Stopped(signum)


def _ignore_while_ending(before: Mapping[signal.Signals, Any]) -> None:
    """Let signals not change how the process ends; after `PATIENCE`, they are handled as before."""
    end = time.monotonic() + PATIENCE

    def handle(signum: int, frame: FrameType | None) -> None:
        if time.monotonic() > end:
            _set_handlers(before)
            signal.raise_signal(signum)

    _set_handlers({n: handle for n in SIGNALS if before[n] is not signal.SIG_IGN})
    atexit.register(_set_handlers, dict.fromkeys(SIGNALS, signal.SIG_IGN))


def _set_handlers(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
