"""Generation with a cache against recomputing the window for every byte.

Past the first T bytes, where every T / 2 bytes the window slides; that is counted in. "drawn" is
what a user gets after a short prompt: reading, the distribution, and the draws.

python -m benchmarks.generate --threads 1
python -m benchmarks.generate --batch 64 -n 252 --only cached --only drawn
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import torch
from torch import Tensor

from benchmarks.timing import describe_machine
from niels_gpt import ModelConfig, TrainConfig, make_state
from niels_gpt.device import keep_freed_memory
from niels_gpt.inference.cached import bind
from niels_gpt.inference.generate import begin, extend, generate, window_start
from niels_gpt.loss import forward
from niels_gpt.optim.trees import Tree

Side = Callable[[], None]


def cached(params: Tree, cfg: ModelConfig, text: Tensor) -> Side:
    """Read what follows the first T of the texts (B, T + n), one byte at a time."""
    weights = bind(params, cfg)
    first = begin(weights, text[:, : cfg.T])

    def side() -> None:
        context = first
        for ids in text[:, cfg.T :].unbind(1):
            context = extend(weights, context, ids)

    return side


def recomputed(params: Tree, cfg: ModelConfig, text: Tensor) -> Side:
    """Read the same, for each byte all of the last T."""

    def side() -> None:
        for n in range(cfg.T + 1, text.shape[1] + 1):
            forward(params, text[:, n - cfg.T : n], cfg)

    return side


def recomputed_windows(params: Tree, cfg: ModelConfig, text: Tensor) -> Side:
    """Read the same, for each byte the window that the cache covers."""

    def side() -> None:
        for n in range(cfg.T + 1, text.shape[1] + 1):
            forward(params, text[:, window_start(n, cfg.T) : n], cfg)

    return side


def drawn(params: Tree, cfg: ModelConfig, text: Tensor) -> Side:
    """Generate as many bytes by `generate`, draws included, after a prompt of four."""
    B, n = text.shape[0], text.shape[1] - cfg.T

    def side() -> None:
        generate(params, cfg, b"The ", n, samples=range(B))

    return side


SIDES = {
    "cached": cached,
    "drawn": drawn,
    "last T anew": recomputed,
    "same window anew": recomputed_windows,
}


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "-n", "n", type=click.IntRange(1), default=128, show_default=True, help="Bytes per round."
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Default: torch's own choice.")
@click.option("--only", multiple=True, type=click.Choice(list(SIDES)), help="Repeatable.")
@click.option("--cpu-time", is_flag=True, help="Measure CPU time: for a busy machine.")
def main(
    rounds: int, n: int, batch: int, threads: int | None, only: tuple[str, ...], cpu_time: bool
) -> None:
    """Print bytes per second with the default model, and the ratios."""
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    cfg = ModelConfig()
    params = make_state(cfg, TrainConfig()).params
    text = torch.randint(256, (batch, cfg.T + n), generator=torch.Generator().manual_seed(0))
    clock = time.process_time if cpu_time else time.perf_counter
    sides = {name: SIDES[name](params, cfg, text) for name in only or SIDES}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with torch.no_grad():
        for _ in range(rounds):
            for name, side in sides.items():
                started = clock()
                side()
                seconds[name].append(clock() - started)
    click.echo(", ".join(f"{key} {value}" for key, value in describe_machine().items()))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in median.items():
        rate = batch * n / value
        ratio = value / next(iter(median.values()))
        click.echo(f"{name:17s} {rate:9.0f} bytes/s, {ratio:5.1f} times the time of the first")


if __name__ == "__main__":
    main()
