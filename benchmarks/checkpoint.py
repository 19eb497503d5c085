"""A durable, verified save and load of the default model against bare torch.save and torch.load.

python -m benchmarks.checkpoint --threads 1
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import torch

from benchmarks.timing import describe_machine
from niels_gpt import ModelConfig, TrainConfig, make_state
from niels_gpt.checkpoint import checkpoint_of, open_checkpoint, payload_of, write_checkpoint


def make_sides(folder: Path) -> dict[str, Callable[[], object]]:
    """Return the four things to time, on a state of the default model after one update."""
    state = make_state(ModelConfig(), TrainConfig())
    checkpoint = checkpoint_of(state._replace(step=1))
    payload = payload_of(checkpoint)
    ours, bare = folder / "ours.pt", folder / "bare.pt"
    return {
        "save": lambda: write_checkpoint([ours], checkpoint),
        "load": lambda: open_checkpoint(ours),
        "torch.save": lambda: torch.save(payload, bare),
        "torch.load": lambda: torch.load(bare, weights_only=True),
    }


def median_milliseconds(
    sides: dict[str, Callable[[], object]], rounds: int
) -> dict[str, tuple[float, float]]:
    """Time the sides alternately, in wall time and in CPU time."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            wall, processor = time.perf_counter(), time.process_time()
            side()
            taken[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {
        name: (median(t[0] for t in times) * 1e3, median(t[1] for t in times) * 1e3)
        for name, times in taken.items()
    }


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Default: torch's own choice.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
def main(rounds: int, threads: int | None, folder: Path | None) -> None:
    """Print milliseconds, and the size of the file; `--folder` chooses the disk."""
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        figures = median_milliseconds(make_sides(Path(name)), rounds)
        size = (Path(name) / "ours.pt").stat().st_size
    click.echo(f"{describe_machine()}")
    click.echo(f"{size / 1e6:.1f} MB; milliseconds of wall time and CPU time:")
    for side, (wall, processor) in figures.items():
        click.echo(f"{side:<12}{wall:8.1f}{processor:8.1f}")


if __name__ == "__main__":
    main()
