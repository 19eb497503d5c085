"""Options of commands that generate text."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from niels_gpt.cli.shared.options import (
    Command,
    ckpt_option,
    device_option,
    refuse_without_effect,
)

if TYPE_CHECKING:
    from niels_gpt.checkpoint import Checkpoint
    from niels_gpt.inference.generate import Sampling


class Generation(NamedTuple):
    """The options for generating text."""

    ckpt: Path
    max_bytes: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    device: str

    def prepare(self) -> tuple[Checkpoint, Sampling]:
        """Load the model and check the sampling options.

        Sets torch to one thread, because one byte is too little work to share: on a busy machine,
        two threads were ten times slower than one.

        Raises:
            OSError, ValueError: for an invalid checkpoint or option.
        """
        import torch

        from niels_gpt.inference.generate import Sampling
        from niels_gpt.inference.load import load_model

        sampling = Sampling(self.temperature, self.top_k, self.top_p)
        trained = load_model(self.ckpt, self.device)
        torch.set_num_threads(1)
        return trained, sampling


def generation_options(command: Command) -> Command:
    """Add an option for each field of `Generation`; the command gets them as `generation`."""

    @functools.wraps(command)
    def with_generation(**given: Any) -> Any:
        generation = Generation(**{name: given.pop(name) for name in Generation._fields})
        if generation.temperature == 0:
            refuse_without_effect("with --temperature 0", "top_k", "top_p")
        return command(generation=generation, **given)

    decorated: Command = with_generation
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


_OPTIONS = (
    ckpt_option,
    click.option("--max-bytes", type=click.IntRange(0), default=512, help="Maximum length."),
    click.option("--temperature", type=float, default=0.8, help="0: the most likely byte."),
    click.option("--top-k", type=int, metavar="K", help="Only the K most likely bytes."),
    click.option("--top-p", type=float, metavar="P", help="Only the most likely that reach P."),
    click.option("--seed", type=int, default=42, help="Same seed, same text."),
    device_option(),
)
