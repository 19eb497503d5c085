"""Tiny Shakespeare: nanoGPT's recipe for a CPU as a plain loop, and `train`, as whole processes.

    python -m benchmarks.shakespeare input.txt

The recipe: 2,000 steps of 12 rows of 64 bytes, AdamW from 1e-3 to 1e-4 (betas 0.9 and 0.95, not
its 0.99), on the network of `benchmarks/imperative.py`, which has rotary positions where nanoGPT
has learned ones. The first 90 % of the text is trained on. All sides evaluate the same number of
times on the same number of bytes; times include start-up, evaluations and saving.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from niels_gpt.files.names import METRICS

MODEL = {"T": 64, "C": 128, "L": 4, "H": 4, "d_ff": 512, "dropout": 0.0}
EVAL_ROWS = 1200
COMMON = {"grad_clip": 1.0, "weight_decay": 0.1, "p_train": {"wiki": 1.0}}
RECIPE = {"B": 12, "total_steps": 2000, "base_lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 100}
OURS = {"optimizer": "muon", "init": "fan_in", "min_lr": 0.0, "lr_decay": "linear"}
RATES = {"a quarter of its time": 0.016, "all of its time": 0.01}


def write_config(path: Path, train: dict[str, Any]) -> Path:
    """Write a config of the network; it is evaluated in the middle and at the end."""
    total = train["total_steps"]
    every = {"eval_every": -(-total // 2), "eval_steps": EVAL_ROWS // train["B"]}
    config = {"model": MODEL, "train": {**COMMON, **every, "ckpt_every": total, **train}}
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def timed(words: list[str]) -> float:
    """Run a module to its end; return the seconds that it took."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def last_loss(path: Path) -> float:
    """Return the last validation loss of a log."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return float([r["val_wiki_loss"] for r in records if "val_wiki_loss" in r][-1])


@click.command()
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--quarter", nargs=2, type=int, default=(12, 255), show_default=True)
@click.option("--whole", nargs=2, type=int, default=(24, 900), show_default=True)
@click.option("--set", "settings", multiple=True, help="Of `train`.")
def main(
    text: Path, quarter: tuple[int, int], whole: tuple[int, int], settings: tuple[str, ...]
) -> None:
    """Print time and loss of each side; `--quarter` and `--whole` are rows and steps of ours."""
    data = text.read_bytes()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cut = len(data) * 9 // 10
        for name, part in (("train.txt", data[:cut]), ("val.txt", data[cut:])):
            (folder / name).write_bytes(part)
        wiki = ["--wiki", str(folder)]
        click.echo("| side | rows x steps | MB | seconds | of the recipe's | nats |")
        click.echo("| --- | --- | --- | --- | --- | --- |")

        def report(side: str, B: int, steps: int, seconds: float, log: Path) -> None:
            size, share = B * steps * MODEL["T"] / 1e6, seconds / recipe_seconds
            click.echo(
                f"| {side} | {B} x {steps:,} | {size:.2f} | {seconds:.0f} | {share:.2f} | "
                f"{last_loss(log):.4f} |"
            )

        config, log = write_config(folder / "recipe.json", RECIPE), folder / "recipe.jsonl"
        plain = ["benchmarks.learning_curve", "--config", str(config), *wiki, "--steps", "2000"]
        recipe_seconds = timed([*plain, "--out", str(log)])
        report("the recipe as a plain loop", 12, 2000, recipe_seconds, log)
        for (side, rate), (B, steps) in zip(RATES.items(), (quarter, whole), strict=True):
            train = {**OURS, "B": B, "total_steps": steps, "base_lr": rate}
            config = write_config(folder / "ours.json", {**train, "warmup_steps": steps // 16})
            out = folder / side
            words = ["niels_gpt.train", "--config", str(config), *wiki, "--mix", "wiki=1"]
            sets = [word for setting in settings for word in ("--set", setting)]
            seconds = timed([*words, *sets, "--no-sample", "--out", str(out)])
            report(f"`train`, {side}", B, steps, seconds, out / METRICS)


if __name__ == "__main__":
    main()
