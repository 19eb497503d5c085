"""A short text by the model of a run, printed at its end and, if asked, with each evaluation."""

import contextlib
from collections.abc import Iterator

import torch

from niels_gpt.inference.generate import START, Sampling, generate
from niels_gpt.state import TrainState

LENGTH = 200  # bytes
SAMPLING = Sampling(temperature=0.8)  # as the `sample` command


def excerpt(state: TrainState) -> str:
    """Return what the model of a state writes on a new line, fit for any terminal.

    The draws have a key of their own, (seed, "excerpt", step), so nothing of the run changes.

    Raises:
        ValueError: if the output of the model is not finite.
    """
    with one_thread():
        (text,) = generate(
            state.params,
            state.model_cfg,
            START,
            LENGTH,
            seed=state.train_cfg.seed,
            samples=[state.step],
            sampling=SAMPLING,
            purpose="excerpt",
        )
    return readable(text)


def readable(text: bytes) -> str:
    """Return bytes as text without what a terminal would obey; a character cut at the end is lost.

    Invalid UTF-8, control characters, and invisible ones such as those that reverse the direction
    of a line, become U+FFFD.
    """
    decoded = text.decode(errors="replace")
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in decoded)
    return shown.rstrip("\ufffd \n\t").lstrip("\n")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread inside: a byte is too little work to share, as in `sample`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
