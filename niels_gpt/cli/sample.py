"""The `sample` command: text that goes on from a prompt."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from niels_gpt.cli.shared.generation import generation_options, use_one_thread
from niels_gpt.cli.shared.options import HELP
from niels_gpt.failures import exit_on_failure
from niels_gpt.terminal import exit_on_interrupt, note, write

if TYPE_CHECKING:
    from niels_gpt.inference.generate import Sampling
    from niels_gpt.inference.load import Trained

GROUP = 64  # samples in one pass


@click.command(
    context_settings={**HELP, "show_default": True},
    epilog="Example: niels-gpt sample --ckpt checkpoints/best.pt --prompt 'The river ' -n 3",
)
@click.option(
    "--prompt",
    default="",
    show_default="a new line",
    metavar="TEXT",
    help="What to go on from; - reads stdin.",
)
@click.option("-n", "n", type=click.IntRange(1), default=1, help="Number of samples.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@generation_options
def main(
    prompt: str,
    n: int,
    as_json: bool,
    ckpt: Path,
    max_bytes: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    device: str | None,
) -> None:
    """Write text that goes on from a prompt, as it is generated.

    The same checkpoint, prompt and seed give the same text. Sample i of -n is the same for
    every n. An empty prompt begins with a new line.
    """
    with exit_on_interrupt():
        with exit_on_failure(2):
            from niels_gpt.device import resolve_device
            from niels_gpt.inference.generate import Sampling, window_start
            from niels_gpt.inference.load import load_model

            sampling = Sampling(temperature, top_k, top_p)
            trained = load_model(ckpt, resolve_device(device))
            start = _read_prompt(prompt)
        if unseen := window_start(len(start), trained.cfg.T):
            note(f"the prompt has {len(start):,} bytes; the last {len(start) - unseen} are seen")
        use_one_thread()
        with exit_on_failure(1):
            began = time.perf_counter()
            if as_json:
                texts = _texts(trained, start, max_bytes, seed, n, sampling)
                write(_as_json(ckpt, trained, start, seed, sampling, texts) + "\n")
            elif n == 1:
                _write_stream(trained, start, max_bytes, seed, sampling)
            else:
                for i, text in enumerate(_texts(trained, start, max_bytes, seed, n, sampling)):
                    write(f"--- sample {i} ---\n{_decode(start + text)}\n")
            seconds = time.perf_counter() - began
        rate = n * max_bytes / max(seconds, 1e-9)
        note(f"{n * max_bytes:,} bytes in {seconds:.1f} s, {rate:,.0f} bytes/s")


def _read_prompt(prompt: str) -> bytes:
    """Return the bytes of the prompt: stdin's as they are, an argument's as the shell gave them."""
    if prompt == "-":
        return sys.stdin.buffer.read()
    return prompt.encode("utf-8", "surrogateescape")


def _write_stream(
    trained: Trained, start: bytes, max_bytes: int, seed: int, sampling: Sampling
) -> None:
    from niels_gpt.inference.generate import decode_stream, stream

    steps = stream(trained.params, trained.cfg, start, max_bytes, seed=seed, sampling=sampling)
    for piece in decode_stream(chain([start], steps)):
        write(piece)
    write("\n")


def _texts(
    trained: Trained, start: bytes, max_bytes: int, seed: int, n: int, sampling: Sampling
) -> Iterator[bytes]:
    from niels_gpt.inference.generate import generate

    for first in range(0, n, GROUP):
        samples = range(first, min(first + GROUP, n))
        yield from generate(
            trained.params,
            trained.cfg,
            start,
            max_bytes,
            seed=seed,
            samples=samples,
            sampling=sampling,
        )


def _as_json(
    ckpt: Path,
    trained: Trained,
    start: bytes,
    seed: int,
    sampling: Sampling,
    texts: Iterable[bytes],
) -> str:
    return json.dumps(
        {
            "checkpoint": str(ckpt),
            "step": trained.payload["step"],
            "seed": seed,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "prompt": _decode(start),
            "samples": [
                {"sample": i, "bytes": len(text), "text": _decode(text)}
                for i, text in enumerate(texts)
            ],
        },
        ensure_ascii=False,
        indent=2,
    )


def _decode(text: bytes) -> str:
    return text.decode("utf-8", errors="replace")
