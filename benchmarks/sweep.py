"""A sweep under vmap against the same models one by one, alternating in one process.

python -m benchmarks.sweep --threads 1     # about 3 minutes
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import click
import torch

from benchmarks.timing import describe_machine, median_seconds
from niels_gpt import ModelConfig, TrainConfig, make_state
from niels_gpt.analysis import sweep
from niels_gpt.corpus import Corpus, advance
from niels_gpt.device import keep_freed_memory

WIDTHS = (32, 64, 128, 256)
MEMBERS = (2, 4, 8)
STREAM = bytes(i * i // 7 % 251 for i in range(100_000))
TEXT = Corpus({"wiki": STREAM}, {"wiki": STREAM}, {"wiki": 1.0}, seed=42, B=16, T=128)


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Default: torch's own choice.")
@click.option("--dropout", type=float, default=0.0, show_default=True)
@click.option("--cpu-time", is_flag=True, help="Measure CPU time: for a busy machine.")
def main(rounds: int, threads: int | None, dropout: float, cpu_time: bool) -> None:
    """Print the time of a step of all models together, relative to the models one by one."""
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    clock = time.process_time if cpu_time else time.perf_counter
    click.echo(", ".join(f"{key} {value}" for key, value in describe_machine().items()))
    click.echo(f"L=4, H=4, d_ff=4C, T=128, B=16, dropout {dropout:g}; median of {rounds}")
    click.echo("    C  models  together s  one by one s  ratio")
    ratios: dict[tuple[int, int], float] = {}
    for C in WIDTHS:
        for members in MEMBERS:
            together, alone = times(C, members, dropout, rounds, clock)
            ratios[C, members] = ratio = together / alone
            click.echo(f"{C:>5}  {members:>6}  {together:10.3f}  {alone:12.3f}  {ratio:5.2f}")
    click.echo("\n".join(["", *table(ratios)]))


def table(ratios: Mapping[tuple[int, int], float]) -> list[str]:
    """Format the ratios of (C, members) as a Markdown table, one row per C."""
    head = ["C", *(f"{members} models" for members in MEMBERS)]
    rows = [[str(C), *(f"{ratios[C, members]:.2f}" for members in MEMBERS)] for C in WIDTHS]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def times(
    C: int, members: int, dropout: float, rounds: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Return the seconds of one step of all models, together and one by one."""
    model_cfg = ModelConfig(T=128, C=C, d_ff=4 * C, dropout=dropout)
    cfg = TrainConfig(B=16, total_steps=100, p_train={"wiki": 1.0})
    cfgs = sweep.grid(cfg, [1e-3 * (i + 1) for i in range(members)], [0.1], [42])
    states = [make_state(model_cfg, c) for c in cfgs]
    stacked = sweep.stack(states)
    seconds = median_seconds(
        {
            "together": lambda: sweep.advance_all(stacked, cfgs, TEXT),
            "alone": lambda: [advance(state, TEXT) for state in states],
        },
        rounds=rounds,
        warmup=1,
        clock=clock,
    )
    return seconds["together"], seconds["alone"]


if __name__ == "__main__":
    main()
