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
@click.option(
    "--before",
    type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
    help="Another checkout: measure it too, in turn with this one.",
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(
    only: tuple[str, ...],
    quick: bool,
    threads: int | None,
    before: Path | None,
    json_path: Path | None,
) -> None:
    """Print each figure and whether it meets its target; about 15 minutes on two cores."""
    if threads:
        torch.set_num_threads(threads)
    effort = Effort(*((3, 1) if quick else (10, 2)), before)
    machine = {**describe_machine(), "freed_memory_kept": keep_freed_memory()}
    click.echo(", ".join(f"{key} {value}" for key, value in machine.items()))
    figures: list[Figure] = []
    for name in only or ROWS:
        for figure in ROWS[name](effort):
            click.echo(format_figure(figure))
            figures.append(figure)
    if json_path:
        rows = [{**f._asdict(), "met": f.met if f.bar else None} for f in figures]
        measured = {"rounds": effort.rounds, "warmup": effort.warmup, "figures": rows}
        text = json.dumps({"machine": machine, **measured}, indent=2)
        json_path.write_text(text + "\n", encoding="utf-8")


def format_figure(figure: Figure) -> str:
    detail = "  ".join(f"{key} {value:.4g}" for key, value in figure.detail.items())
    sign = ">=" if figure.at_least else "<="
    verdict = "met" if figure.met else "MISSED"
    bar = f"{sign} {figure.bar:g}" if figure.bar else ""
    return f"{figure.name:46s} {figure.value:8.3f}  {bar:8s} {verdict if bar else '':7s} {detail}"


if __name__ == "__main__":
    main()
