"""Our training step against the plain loop, alternating in one process.

python -m benchmarks.train_step --config configs/smoke.json
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from benchmarks.sides import imperative_side, our_side
from benchmarks.timing import (
    describe_machine,
    make_sgemm,
    median_seconds,
    sgemm_flops,
)
from niels_gpt.config import load_config_from_json
from niels_gpt.device import keep_freed_memory
from niels_gpt.model.flops import step_flops


@click.command()
@click.option("--config", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Default: torch's own choice.")
def main(config: Path, rounds: int, threads: int | None) -> None:
    """Print the median step time of both sides, their ratio, and the share of the floor."""
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    model_cfg, train_cfg = load_config_from_json(config)
    seconds = median_seconds(
        {
            "sgemm": make_sgemm(),
            "imperative": imperative_side(model_cfg, train_cfg),
            "niels_gpt": our_side(model_cfg, train_cfg),
        },
        rounds=rounds,
    )
    rate = sgemm_flops() / seconds["sgemm"]
    floor = step_flops(model_cfg, B=train_cfg.B) / rate
    click.echo(", ".join(f"{key} {value}" for key, value in describe_machine().items()))
    click.echo(f"sgemm       {rate / 1e9:8.1f} GFLOP/s, so a step takes at least {floor:.3f} s")
    for name in ("imperative", "niels_gpt"):
        click.echo(f"{name:11s} {seconds[name]:8.3f} s per step, median of {rounds}")
    ratio = seconds["imperative"] / seconds["niels_gpt"]
    share = floor / seconds["niels_gpt"]
    click.echo(f"niels_gpt is {ratio:.2f} times as fast and reaches {share:.0%} of the floor")


if __name__ == "__main__":
    main()
