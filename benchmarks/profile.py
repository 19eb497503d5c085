"""Where the time of a step goes, by torch's profiler: `python -m benchmarks.profile`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.rows import DEFAULT, LARGE, SMALL
from benchmarks.sides import Side, make_side
from benchmarks.timing import describe_machine, make_sgemm, median_seconds, sgemm_flops
from niels_gpt.config import TrainConfig
from niels_gpt.device import keep_freed_memory

SIDES: dict[str, Callable[[], Side]] = {
    "default step": lambda: make_side("niels_gpt", DEFAULT, TrainConfig()),
    "small step": lambda: make_side("niels_gpt", SMALL, TrainConfig(B=12)),
    "large step": lambda: make_side("niels_gpt", LARGE, TrainConfig(B=8)),
    "evaluation": lambda: make_side("evaluate", DEFAULT, TrainConfig(eval_steps=4)),
    "64 texts": lambda: make_side("sample", DEFAULT, TrainConfig(B=64)),
}

GROUPS = {  # words of an operation's name; the first group with one counts
    "matrix products": ("mm", "matmul", "bmm"),
    "GELU and its gradient": ("gelu",),
    "softmax, layer norms, cross entropy": ("softmax", "layer_norm", "nll"),
    "the hash of dropout": ("bitwise", "shift"),
    "copies, concatenation": ("copy", "cat", "clone", "index", "gather", "stack", "fill", "zero"),
    "elementwise products and sums, clip and update": (
        *("mul", "add", "sub", "div", "sum", "sqrt", "pow", "norm", "where", "neg", "lt", "exp"),
    ),
}
REST = "starting operations, the rest"


def group_of(operation: str) -> str:
    """Return the group of an operation, such as "aten::mm"."""
    name = operation.removeprefix("aten::")
    return next((group for group, words in GROUPS.items() if any(w in name for w in words)), REST)


def shares(side: Side, rounds: int) -> dict[str, float]:
    """Return the share of each group in the time of a side, after a warm-up."""
    side()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(rounds):
            side()
    times = dict.fromkeys((*GROUPS, REST), 0.0)
    for event in profiler.key_averages():
        times[group_of(event.key)] += event.self_cpu_time_total
    return {group: time / sum(times.values()) for group, time in times.items()}


def table(columns: dict[str, dict[str, float]], seconds: dict[str, float]) -> Iterable[str]:
    """Yield the lines of a table in Markdown."""
    titles = [f"{name} ({1e3 * seconds[name]:.0f} ms)" for name in columns]
    yield f"| share of the time | {' | '.join(titles)} |"
    yield "| --- " * (len(columns) + 1) + "|"
    for group in (*GROUPS, REST):
        found = (f"{column[group]:.0%}" for column in columns.values())
        yield f"| {group} | {' | '.join(found)} |"


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(SIDES)), help="Repeatable.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Default: torch's own choice.")
def main(only: tuple[str, ...], rounds: int, threads: int | None) -> None:
    """Print the shares of the groups of operations, and the time without the profiler."""
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    sides = {name: SIDES[name]() for name in only or SIDES}
    seconds = median_seconds({"sgemm": make_sgemm(), **sides}, rounds=rounds)
    machine = describe_machine() | {"sgemm_gflops": round(sgemm_flops() / seconds["sgemm"] / 1e9)}
    click.echo(", ".join(f"{key} {value}" for key, value in machine.items()))
    columns = {name: shares(side, rounds) for name, side in sides.items()}
    click.echo("\n".join(table(columns, seconds)))


if __name__ == "__main__":
    main()
