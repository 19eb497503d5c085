"""Ctrl-C, SIGTERM and SIGHUP as an exception raised only where it is safe.

The first signal is recorded, and raised as `Stopped` by the next `check()`, or at once inside
`immediately()`. A second one ends the process immediately; files are complete at every moment, so
nothing that was saved is lost.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
        self._immediate = False

    @contextlib.contextmanager
    def active(self) -> Iterator["Stop"]:
        """Handle the signals inside. Outside Python's main thread this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            if before[number] is not signal.SIG_IGN:  # respect nohup
                signal.signal(number, self._handle)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raise `Stopped` if a signal has arrived."""
        if self._signum is not None:
            raise Stopped(self._signum)

    @contextlib.contextmanager
    def immediately(self) -> Iterator[None]:
        """Let a signal raise `Stopped` at any point inside; the code inside must tolerate that."""
        self._immediate = True
        try:
            self.check()
            yield
        finally:
            self._immediate = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None:
            os._exit(128 + signum)
        self._signum = signum
        if self._immediate:
            raise Stopped(signum)
