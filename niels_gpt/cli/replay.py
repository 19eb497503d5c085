"""The `replay` command: repeat steps of a run, compare them or look inside one."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from niels_gpt.cli.shared.options import (
    HELP,
    PATH,
    device_option,
    json_option,
    source_options,
)
from niels_gpt.cli.shared.output import console, exit_on_failure
from niels_gpt.data.sources import Given

if TYPE_CHECKING:
    from niels_gpt.analysis.replay import StepView, Verdict

SHOWN = 8  # lines of a table


@click.command(
    context_settings=HELP,
    epilog="Example: niels-gpt replay --from checkpoints/step_0001000.pt "
    "--to checkpoints/step_0002000.pt",
)
@click.option("--from", "start", type=PATH, metavar="PATH", help="Checkpoint (or its folder).")
@click.option("--to", "end", type=PATH, metavar="PATH", help="Checkpoint to reach and compare.")
@click.option("--step", type=click.IntRange(1), help="Look inside this step instead.")
@source_options
@device_option(of_run=True)
@json_option()
def main(
    start: Path | None,
    end: Path | None,
    step: int | None,
    given: Given,
    device: str | None,
    as_json: bool,
) -> None:
    """Repeat steps of a run.

    With --to: run from one checkpoint (by default the initial state) to the other and compare
    every tensor bit for bit. Exit code 0 if identical, 1 with the first difference if not, 2 if
    they could not be compared.

    With --step: run to that step from the nearest earlier checkpoint, and show its batch, the
    loss of each row, gradient norms and the largest activations.
    """
    if (end is None) == (step is None):
        raise click.UsageError("give either --to PATH or --step N")
    with exit_on_failure(2, busy="reading the text"):
        from niels_gpt import paths
        from niels_gpt.analysis.replay import replay_files, view_files
        from niels_gpt.run.call import remembered
        from niels_gpt.streams import locate

        files = [path for path in (end, start) if path is not None]
        given, told = remembered(given, files or [paths.CHECKPOINT_DIR])
        console.tell(*told)
        sources = locate(given)
        if end is not None:
            verdict = replay_files(start, end, sources, device, _show_step)
            console.tell(*verdict.messages)
            console.result(verdict, _verdict_lines(verdict), as_json=as_json)
            sys.exit(0 if verdict.identical else 1)
        assert step is not None
        folder = start or paths.CHECKPOINT_DIR
        view, begin, messages = view_files(folder, step, sources, device, _show_step)
        console.tell(*messages, f"step {step} was reached from {begin}")
        console.result(view, _view_lines(view), as_json=as_json)


def _show_step(step: int) -> None:
    console.show(f"step {step}")


def _verdict_lines(verdict: Verdict) -> list[str]:
    if verdict.identical:
        return [f"identical: every bit of {verdict.saved}"]
    largest = sorted(verdict.differences, key=lambda d: -d.size)
    first, count = verdict.differences[0], len(verdict.differences)
    rows = [
        f"  {d.tensor:<36} {d.elements:>9,} {d.size:>10.3g}  {d.here!r} at {list(d.place)}, "
        f"saved {d.there!r}"
        for d in largest[:SHOWN]
    ]
    return [
        f"different: first seen at step {verdict.differs}, in {first.tensor}, by {first.size:.3g}",
        f"every bit is the same after step {verdict.same}",
        *(
            [
                f"so is the loss of the state after step {verdict.agreed}: the difference arose "
                "later, or was too small to change it"
            ]
            if verdict.agreed > verdict.same
            else []
        ),
        f"{count} tensor{'s differ' if count > 1 else ' differs'} from {verdict.saved}, the "
        "largest first:",
        f"  {'tensor':<36} {'elements':>9} {'size':>10}",
        *rows,
    ]


def _view_lines(view: StepView) -> list[str]:
    worst = max(view.rows, key=lambda row: _size(row.loss))
    by_norm = sorted(view.grad_norms.items(), key=lambda item: -_size(item[1]))
    by_size = sorted(view.activations.items(), key=lambda item: -_size(item[1]))
    broken = [name for name, value in view.activations.items() if not math.isfinite(value)]
    return [
        f"step {view.step}: loss {view.loss:.4f} nats, lr {view.lr:.3e}, "
        f"gradient norm {view.grad_norm:.4g}, scaled by {view.clip:.3g}",
        *([f"not finite: first in {broken[0]}"] if broken else []),
        "",
        f" row  {'source':<7} {'from byte':>11}  {'loss':>7}  text",
        *(
            f"{i:>4}  {row.source:<7} {row.start:>11,}  {row.loss:7.4f}  {_one_line(row.text)}"
            for i, row in enumerate(view.rows)
        ),
        "",
        "the row with the highest loss:",
        *worst.text.split("\n"),
        "",
        "largest gradient norms (before clipping)",
        *(f"  {name:<36} {value:10.4g}" for name, value in by_norm[:SHOWN]),
        "largest activations",
        *(f"  {name:<36} {value:10.4g}" for name, value in by_size[:SHOWN]),
    ]


def _size(value: float) -> float:
    """Sort NaN first: it is what one looks for."""
    return math.inf if math.isnan(value) else value


def _one_line(text: str) -> str:
    return json.dumps(text[:40], ensure_ascii=False)
