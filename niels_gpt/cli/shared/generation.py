"""The options of the commands that generate text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from niels_gpt.cli.shared.options import PATH

Command = Callable[..., Any]


def generation_options(command: Command) -> Command:
    """Add --ckpt, --max-bytes, --temperature, --top-k, --top-p, --seed and --device."""
    for option in reversed(
        (
            click.option("--ckpt", type=PATH, required=True, metavar="PATH", help="Checkpoint."),
            click.option(
                "--max-bytes", type=click.IntRange(0), default=512, help="At most so many bytes."
            ),
            click.option(
                "--temperature", type=float, default=0.8, help="0: always the likeliest byte."
            ),
            click.option("--top-k", type=int, metavar="K", help="Only the K likeliest bytes."),
            click.option(
                "--top-p", type=float, metavar="P", help="Only the likeliest that reach P together."
            ),
            click.option("--seed", type=int, default=42, help="Same seed, same text."),
            click.option(
                "--device", metavar="NAME", help="cpu, mps or cuda; by default mps where it is."
            ),
        )
    ):
        command = option(command)
    return command


def use_one_thread() -> None:
    """Let torch compute with one thread.

    One byte is too little work to share. On a machine that is busy with other programs, two threads
    that wait for each other were measured ten times slower than one.
    """
    import torch

    torch.set_num_threads(1)
