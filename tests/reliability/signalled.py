"""A `train` command that sends itself a signal at a chosen point.

`python -m tests.reliability.signalled PHASE NTH SIGNALS train ARGS...`: when the function of PHASE
is entered for the NTH time, each of the comma-separated signals is sent to the process, from
within, 0 being a pause of 1.1 seconds; everything else is the command as it is.
"""

import functools
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import niels_gpt.data.cache  # noqa: F401  # has the writer as it is: the text's cache is no save

PHASES = {
    "loading": "niels_gpt.streams.build_sources",
    "step": "niels_gpt.step.get_batch",
    "evaluation": "niels_gpt.eval.get_batch",
    "save": "niels_gpt.files.durable.write_durably",
    "metrics": "niels_gpt.files.durable.append_bytes",
}


def signalling(
    function: Callable[..., Any], nth: int, signals: Sequence[int]
) -> Callable[..., Any]:
    """Return a function, preceded by the signals on its nth call."""
    calls = 0

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == nth:
            for number in signals:
                if number:
                    os.kill(os.getpid(), number)
                else:
                    time.sleep(1.1)
        return function(*args, **kwargs)

    return wrapper


def send_on_call(target: str, nth: int, signals: Sequence[int]) -> None:
    """Replace the function at `target` by itself, preceded by the signals on its nth call."""
    module_name, _, name = target.rpartition(".")
    module = importlib.import_module(module_name)
    setattr(module, name, signalling(getattr(module, name), nth, signals))


if __name__ == "__main__":
    phase, nth, numbers, *args = sys.argv[1:]
    send_on_call(PHASES[phase], int(nth), [int(n) for n in numbers.split(",")])
    from niels_gpt.cli import main

    main(args, prog_name="niels-gpt")
