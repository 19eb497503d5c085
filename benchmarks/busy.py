"""A step beside other programs: `python -m benchmarks.busy` (on an otherwise quiet machine).

Measures a process of its own for each way in which OpenMP's threads may wait for each other, alone
and beside one busy process for each processor, all ways in turn. `spin N` is GOMP_SPINCOUNT=N.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from benchmarks.sides import side_of
from benchmarks.timing import median_seconds
from niels_gpt.config import load_config_from_json
from niels_gpt.device import WAITING, available_processors
from niels_gpt.paths import CONFIG_DIR, REPO_ROOT

STEPS = 20
LOOP = "while True: pass"


@contextlib.contextmanager
def busy_processors(count: int) -> Iterator[None]:
    """Keep so many processes busy."""
    processes = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds_per_step(checkout: Path, side: str, config: Path, way: dict[str, str]) -> float:
    """Return the median time of a step in a process with this environment."""
    others = {name: value for name, value in os.environ.items() if name not in WAITING}
    cfgs = load_config_from_json(config)
    with side_of(checkout, side, *cfgs, environment={**others, **way}) as step:
        return median_seconds({side: step}, rounds=STEPS, warmup=3)[side]


@click.command()
@click.option("--config", type=click.Path(exists=True, path_type=Path))
@click.option("--spins", type=int, multiple=True, default=(0, 500, 2000, 20000), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--before", type=click.Path(exists=True, resolve_path=True, path_type=Path))
def main(config: Path | None, spins: tuple[int, ...], rounds: int, before: Path | None) -> None:
    """Print the median step of each side and way, alone and beside busy processes."""
    config = config or CONFIG_DIR / "quick.json"
    default = "OpenMP's default"
    ways = {default: {}, **{f"spin {n}": {"GOMP_SPINCOUNT": str(n)} for n in spins}}
    sides = [("plain loop", default), *(("niels_gpt", way) for way in ways)]
    places = {"plain loop": (REPO_ROOT, "imperative"), "niels_gpt": (REPO_ROOT, "niels_gpt")}
    if before:
        sides.append(("before", default))
        places["before"] = before, "niels_gpt"
    click.echo("| side | waiting | alone, ms | busy, ms | busy / alone |")
    click.echo("| --- | --- | --- | --- | --- |")
    taken: dict[tuple[str, str, bool], list[float]] = {}
    for _ in range(rounds):
        for busy in (0, available_processors()):
            with busy_processors(busy):
                for side, way in sides:
                    seconds = seconds_per_step(*places[side], config, ways[way])
                    taken.setdefault((side, way, busy > 0), []).append(seconds)
    for side, way in sides:
        alone, beside = (1e3 * statistics.median(taken[side, way, i]) for i in (False, True))
        click.echo(f"| {side} | {way} | {alone:.1f} | {beside:.1f} | {beside / alone:.2f} |")


if __name__ == "__main__":
    main()
