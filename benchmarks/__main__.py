"""`python -m benchmarks`: measure every row of docs/performance.md on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch

from benchmarks.rows import ROWS, Effort, Figure
from benchmarks.timing import describe_machine
from niels_gpt.device import keep_freed_memory


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(ROWS)), help="Repeatable.")
@click.option("--quick", is_flag=True, help="Few rounds: a rough check, not a measurement.")
@click.option("--threads", type=click.IntRange(1), help="Default: torch's own choice.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(only: tuple[str, ...], quick: bool, threads: int | None, json_path: Path | None) -> None:
    """Print each figure and whether it meets its target; about 20 minutes on two cores."""
    if threads:
        torch.set_num_threads(threads)
    effort = Effort(rounds=3, warmup=1) if quick else Effort(rounds=10, warmup=2)
    machine = {**describe_machine(), "freed_memory_kept": keep_freed_memory()}
    click.echo(", ".join(f"{key} {value}" for key, value in machine.items()))
    figures: list[Figure] = []
    for name in only or ROWS:
        for figure in ROWS[name](effort):
            click.echo(format_figure(figure))
            figures.append(figure)
    if json_path:
        rows = [{**figure._asdict(), "met": figure.met} for figure in figures]
        text = json.dumps({"machine": machine, **effort._asdict(), "figures": rows}, indent=2)
        json_path.write_text(text + "\n", encoding="utf-8")


def format_figure(figure: Figure) -> str:
    detail = "  ".join(f"{key} {value:.4g}" for key, value in figure.detail.items())
    sign = ">=" if figure.at_least else "<="
    verdict = "met" if figure.met else "MISSED"
    bar = f"{sign} {figure.bar:g}" if figure.bar else ""
    return f"{figure.name:38s} {figure.value:8.3f}  {bar:8s} {verdict if bar else '':7s} {detail}"


if __name__ == "__main__":
    main()
