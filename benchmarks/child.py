"""Measurements that need their own process. Each prints one JSON object.

python -m benchmarks.child memory niels_gpt --steps 10
python -m benchmarks.child loop --steps 20
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch

from benchmarks.sides import SIDES, make_side
from niels_gpt.cli.shared.output import EnduringConsole
from niels_gpt.config import load_config_from_json
from niels_gpt.device import keep_freed_memory
from niels_gpt.run import launch, session
from niels_gpt.run.options import TrainOptions
from niels_gpt.step import loop_step

WARMUP = 3


@click.group()
@click.option("--threads", type=click.IntRange(1))
def main(threads: int | None) -> None:
    """Measure one thing in a fresh process."""
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()


@main.command()
@click.argument("side", type=click.Choice(SIDES))
@click.option("--config", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--steps", type=click.IntRange(1), default=10)
@click.option("--compiled", is_flag=True)
def memory(side: str, config: Path, steps: int, compiled: bool) -> None:
    """Peak resident bytes, and page faults per step after the warm-up."""
    step = make_side(side, *load_config_from_json(config), compiled=compiled)
    for _ in range(WARMUP):
        step()
    before = _page_faults()
    for _ in range(steps):
        step()
    _print(peak_bytes=_peak_bytes(), faults_per_step=(_page_faults() - before) / steps)


@main.command()
@click.option("--config", required=True)
@click.option("--steps", type=click.IntRange(2), default=20)
def loop(config: str, steps: int) -> None:
    """Time that the loop adds between steps, relative to the steps themselves."""
    calls: list[tuple[float, float]] = []

    def timed_step(*args: Any) -> Any:
        started = time.perf_counter()
        result = loop_step(*args)
        calls.append((started, time.perf_counter()))
        return result

    with patch.object(session, "loop_step", timed_step), tempfile.TemporaryDirectory() as out:
        total = WARMUP + steps
        settings = {"total_steps": total, "eval_every": total, "ckpt_every": total, "eval_steps": 1}
        overrides = tuple(f"train.{key}={value}" for key, value in settings.items())
        options = TrainOptions(config=config, overrides=overrides, out=Path(out))
        code = launch.run_command(options, EnduringConsole())
    if code:
        raise SystemExit(code)
    calls = calls[WARMUP - 1 :]
    between = sum(later[0] - earlier[1] for earlier, later in pairwise(calls))
    inside = sum(ended - started for started, ended in calls[1:])
    _print(overhead=between / inside, seconds_per_step=inside / steps)


def _print(**values: float) -> None:
    click.echo(json.dumps(values))


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _peak_bytes() -> int:
    """Peak resident size. Not ru_maxrss: on Linux a child inherits its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
