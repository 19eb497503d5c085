"""The `sample` command: continue a prompt."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import click

from niels_gpt.cli.shared.generation import Generation, generation_options
from niels_gpt.cli.shared.options import HELP, json_option
from niels_gpt.cli.shared.output import console, exit_on_failure

if TYPE_CHECKING:
    from niels_gpt.checkpoint import Checkpoint
    from niels_gpt.inference.generate import Sampling

GROUP = 64  # samples in one pass


@click.command(
    context_settings={**HELP, "show_default": True},
    epilog="Example: niels-gpt sample --prompt 'The river ' -n 3",
)
@click.option(
    "--prompt",
    default="",
    show_default="a new line",
    metavar="TEXT",
    help="Text to continue; - reads stdin.",
)
@click.option("-n", "n", type=click.IntRange(1), default=1, help="Number of samples.")
@json_option()
@generation_options
def main(prompt: str, n: int, as_json: bool, generation: Generation) -> None:
    """Continue a prompt, printing text as it is generated.

    The same checkpoint, prompt and seed give the same text. Sample i of -n is the same for
    every n. An empty prompt starts a new line.
    """
    with exit_on_failure(2):
        from niels_gpt.inference.generate import window_start

        trained, sampling = generation.prepare()
        start = _read_prompt(prompt)
    if unseen := window_start(len(start), trained.cfg.T):
        console.tell(
            f"the prompt has {len(start):,} bytes; the last {len(start) - unseen} are seen"
        )
    with exit_on_failure(1):
        began = time.perf_counter()
        texts = _texts(generation, trained, sampling, start, n)
        if as_json:
            console.result(_value(generation, trained, start, texts), (), as_json=True)
        elif n == 1:
            for piece in _pieces(generation, trained, sampling, start):
                console.write(piece)
            console.say("")
        else:
            for i, text in enumerate(texts):
                console.write(f"--- sample {i} ---\n{_decode(start + text)}\n")
        seconds = time.perf_counter() - began
    nbytes = n * generation.max_bytes
    rate = nbytes / max(seconds, 1e-9)
    console.tell(f"{nbytes:,} bytes in {seconds:.1f} s, {rate:,.0f} bytes/s")


def _read_prompt(prompt: str) -> bytes:
    """Return the raw bytes of the prompt, from stdin or the argument."""
    if prompt == "-":
        return sys.stdin.buffer.read()
    return prompt.encode("utf-8", "surrogateescape")


def _pieces(
    generation: Generation, trained: Checkpoint, sampling: Sampling, start: bytes
) -> Iterator[str]:
    """Generate one sample; yield the prompt, then its text as it grows."""
    from niels_gpt.inference.generate import decode_stream, stream

    max_bytes, seed = generation.max_bytes, generation.seed
    steps = stream(trained.params, trained.cfg, start, max_bytes, seed=seed, sampling=sampling)
    return decode_stream(chain([start], steps))


def _texts(
    generation: Generation, trained: Checkpoint, sampling: Sampling, start: bytes, n: int
) -> Iterator[bytes]:
    """Generate n samples in groups."""
    from niels_gpt.inference.generate import generate

    for first in range(0, n, GROUP):
        yield from generate(
            trained.params,
            trained.cfg,
            start,
            generation.max_bytes,
            seed=generation.seed,
            samples=range(first, min(first + GROUP, n)),
            sampling=sampling,
        )


def _value(
    generation: Generation, trained: Checkpoint, start: bytes, texts: Iterable[bytes]
) -> dict[str, Any]:
    return {
        "checkpoint": str(generation.ckpt),
        "step": trained.step,
        "seed": generation.seed,
        "temperature": generation.temperature,
        "top_k": generation.top_k,
        "top_p": generation.top_p,
        "prompt": _decode(start),
        "samples": [
            {"sample": i, "bytes": len(text), "text": _decode(text)} for i, text in enumerate(texts)
        ],
    }


def _decode(text: bytes) -> str:
    return text.decode("utf-8", errors="replace")
