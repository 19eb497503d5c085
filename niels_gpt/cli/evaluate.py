"""The `evaluate` command: the loss of a model on any text."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from niels_gpt.cli.shared.options import (
    HELP,
    ckpt_option,
    device_option,
    json_option,
    refuse_without_effect,
    source_options,
)
from niels_gpt.cli.shared.output import console, exit_on_failure
from niels_gpt.config import SOURCE_NAMES
from niels_gpt.data.sources import Given, all_places

if TYPE_CHECKING:
    from niels_gpt.analysis.score import Report
    from niels_gpt.checkpoint import SourceRecords
    from niels_gpt.state import TrainState
    from niels_gpt.streams import Sources


@click.command(
    context_settings=HELP,
    epilog="Example: niels-gpt evaluate --notes ~/notes --full",
)
@ckpt_option
@click.option("--full", is_flag=True, help="Score every byte once, with a sliding window.")
@click.option("--stride", type=int, metavar="N", help="Bytes between windows (default: T/2).")
@click.option("--rows", type=click.IntRange(1), metavar="N", help="Windows computed at a time.")
@click.option(
    "--source", "names", type=click.Choice(SOURCE_NAMES), multiple=True, help="Only this source."
)
@source_options
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    metavar="N",
    help="Seed (default: the checkpoint's).",
)
@click.option("--steps", type=int, metavar="N", help="Batches (default: the checkpoint's).")
@device_option()
@json_option()
def main(
    ckpt: Path,
    full: bool,
    stride: int | None,
    rows: int | None,
    names: tuple[str, ...],
    given: Given,
    seed: int | None,
    steps: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure how well a model predicts text.

    Scores the validation text of each source (of a run without wiki, of its own) in nats and bits
    per byte with the standard error: by default on the random windows that the run evaluated on;
    with --full every byte once, so that it depends only on text, model and stride.

    --text FILE alone scores the whole file, byte for byte. With --source text it is the source
    `text` of a run, and its validation part is scored.
    """
    file = _whole_file(names, given)
    if not full and (stride, rows) != (None, None):
        raise click.UsageError("--stride and --rows require --full")
    if full and (seed, steps) != (None, None):
        raise click.UsageError("--seed and --steps cannot be used with --full")
    if file is not None:
        refuse_without_effect("with --text, which is scored as it is", "skip_machine_lines")
    with exit_on_failure(2, busy="reading the text"):
        from niels_gpt.analysis.score import Full, Sampled, score_checkpoint

        report = score_checkpoint(
            ckpt,
            partial(_open_text, ckpt, file, names, given, full),
            Full(stride, rows) if full else Sampled(seed, steps),
            device=device,
            on_progress=lambda name, done, total: console.progress(name)(done, total),
        )
    console.tell(*report.messages)
    console.result(_value(ckpt, report), _lines(report), as_json=as_json)


def _whole_file(names: tuple[str, ...], given: Given) -> Path | None:
    """Return the file to score as a whole, None to score the validation texts of sources."""
    if "text" not in given.places or "text" in names:
        return None
    if names or len(given.places) > 1:
        raise click.UsageError(
            "--text cannot be combined with sources; --source text makes it one of them"
        )
    file, *more = map(Path, all_places(given.places["text"]))
    if more or file.is_dir():
        raise click.UsageError(
            "--text takes one file to score as it is; with --source text it takes what `train` "
            "takes, and scores the validation part"
        )
    return file


def _open_text(
    ckpt: Path,
    file: Path | None,
    names: tuple[str, ...],
    given: Given,
    full: bool,
    state: TrainState,
    records: SourceRecords | None,
) -> Sources:
    from niels_gpt.analysis.score import open_file, open_validation
    from niels_gpt.run.call import remembered
    from niels_gpt.streams import as_recorded, locate

    length = 1 if full else state.model_cfg.T + 1
    if file is not None:
        return open_file(file, length=length, records=records)
    own = (records or {}).get("val", {})
    given, told = remembered(given, [ckpt], names or own)
    console.tell(*told)
    where = as_recorded(locate(given), records)
    if own and "wiki" not in own:  # a run on one's own text alone
        where = replace(where, enabled_sources=tuple(dict.fromkeys([*own, *given.places])))
    return open_validation(where, names, state.train_cfg.seed, length=length)


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
