"""The `evaluate` command: how well a model predicts text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from niels_gpt.cli.shared.options import HELP, PATH, Places, source_options
from niels_gpt.cli.shared.output import console, exit_on_failure
from niels_gpt.config import SOURCE_NAMES

if TYPE_CHECKING:
    from niels_gpt.analysis.evaluation import Report


@click.command(
    context_settings=HELP,
    epilog="Example: niels-gpt evaluate --ckpt checkpoints/best.pt --roam ~/notes --full",
)
@click.option("--ckpt", type=PATH, required=True, metavar="PATH", help="Checkpoint.")
@click.option("--full", is_flag=True, help="Score every byte once, with a sliding window.")
@click.option("--stride", type=int, metavar="N", help="Bytes between windows (half a window).")
@click.option("--rows", type=click.IntRange(1), metavar="N", help="Windows computed at a time.")
@click.option("--text", type=PATH, metavar="FILE", help="Score this file instead of the sources.")
@click.option(
    "--source", "names", type=click.Choice(SOURCE_NAMES), multiple=True, help="Only this one."
)
@source_options
@click.option("--seed", type=int, metavar="N", help="Of the samples (the checkpoint's).")
@click.option("--steps", type=int, metavar="N", help="Batches of samples (the checkpoint's).")
@click.option("--device", metavar="NAME", help="cpu, mps or cuda; by default mps where it is.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    ckpt: Path,
    full: bool,
    stride: int | None,
    rows: int | None,
    text: Path | None,
    names: tuple[str, ...],
    places: Places,
    seed: int | None,
    steps: int | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Measure how well a model predicts text.

    That is the validation text of each source, or a file, in nats and bits per byte with the
    standard error. By default on the random windows that the training evaluated on. With --full
    every byte is scored once, and the figure depends on text, model and stride alone.
    """
    if not full and (stride, rows) != (None, None):
        raise click.UsageError("--stride and --rows go with --full")
    if full and (seed, steps) != (None, None):
        raise click.UsageError("--seed and --steps are about samples, and --full takes none")
    if text is not None and (names or places):
        raise click.UsageError("--text FILE is scored alone, without sources")
    with exit_on_failure(2):
        from niels_gpt.analysis import evaluation
        from niels_gpt.device import resolve_device
        from niels_gpt.streams import locate

        report = evaluation.evaluate_checkpoint(
            ckpt,
            lambda state: (
                evaluation.open_validation(
                    locate(places),
                    names,
                    state.model_cfg.T,
                    state.train_cfg.seed,
                    places,
                )
                if text is None
                else evaluation.open_file(text)
            ),
            evaluation.Full(stride, rows) if full else evaluation.Sampled(seed, steps),
            device=resolve_device(device),
            on_progress=lambda name, done, total: console.progress(name)(done, total),
        )
    console.tell(*report.messages)
    console.result(_value(ckpt, report), _lines(report), as_json=as_json)


def _value(ckpt: Path, report: Report) -> dict[str, Any]:
    sources = {
        name: {**score._asdict(), **report.infos[name]._asdict()}
        for name, score in report.scores.items()
    }
    return {"checkpoint": str(ckpt), "step": report.step, **report.method, "sources": sources}


def _lines(report: Report) -> list[str]:
    method = ", ".join(f"{key} {value}" for key, value in report.method.items())
    width = max(map(len, ["text", *report.scores]))
    return [
        f"after step {report.step}; {method}",
        f"{'text':<{width}}  {'nats':>7}  {'std err':>7}  {'bits/byte':>9}  {'bytes scored':>12}",
        *(
            f"{name:<{width}}  {s.nats:7.4f}  "
            + (f"{'-':>7}" if s.standard_error is None else f"{s.standard_error:7.4f}")
            + f"  {s.bits_per_byte:9.4f}  {s.scored:12,}"
            for name, s in report.scores.items()
        ),
    ]
