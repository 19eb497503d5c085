"""The `inspect` command: gradient noise, sharpness and influence at a checkpoint."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from niels_gpt.cli.shared.options import (
    HELP,
    Option,
    ckpt_option,
    device_option,
    json_option,
    refuse_without_effect,
    source_options,
)
from niels_gpt.cli.shared.output import USER_ERRORS, console, describe, exit_on_failure
from niels_gpt.data.sources import Given

if TYPE_CHECKING:
    from niels_gpt.analysis.influence import Influence
    from niels_gpt.analysis.noise import NoiseScale
    from niels_gpt.analysis.sharpness import Curvature, Eigenvalue
    from niels_gpt.corpus import Corpus
    from niels_gpt.state import TrainState
    from niels_gpt.streams import StreamBuildConfig

PARTS = ("noise", "sharpness", "documents")
MOST_BATCHES = 1_000  # all are held in memory
MOST_ITERATIONS = 200  # so is a vector of all parameters for each
CONCERNS = {  # the parts that an option concerns
    "batches": {"noise", "documents"},
    "iterations": {"sharpness"},
    "windows": {"documents"},
    "top": {"documents"},
}


def _count(name: str, default: int, text: str | None = None, most: int | None = None) -> Option:
    kind = click.IntRange(1, most)
    return click.option(name, type=kind, default=default, show_default=True, metavar="N", help=text)


@click.command(
    context_settings=HELP,
    epilog="Example: niels-gpt inspect --notes ~/notes --only documents",
)
@ckpt_option
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="Only this part.")
@source_options
@_count("--batches", 4, most=MOST_BATCHES)
@_count("--iterations", 20, "Maximum Hessian products per sharpness.", most=MOST_ITERATIONS)
@_count("--windows", 2, "Maximum pieces scored per document.")
@_count("--top", 10)
@device_option("cpu")
@json_option("Print one JSON object, with all documents.")
def main(
    ckpt: Path,
    only: tuple[str, ...],
    given: Given,
    batches: int,
    iterations: int,
    windows: int,
    top: int,
    device: str,
    as_json: bool,
) -> None:
    """Measure gradient noise, sharpness, and which documents help or hurt, at one checkpoint.

    noise: the batch size beyond which rows are wasted, from the next batches of the run.

    sharpness: the largest curvature of the loss, and the stable learning rate.

    documents: the notes, and files of --text, on which a step lowers the validation loss of the
    run most and least.
    """
    wanted = only or PARTS
    _refuse_idle_options(wanted, as_json)
    with exit_on_failure(2, busy="reading the text"):
        from niels_gpt.analysis.replay import open_corpus_of
        from niels_gpt.checkpoint import open_checkpoint
        from niels_gpt.run.call import remembered
        from niels_gpt.streams import as_recorded, locate

        checkpoint = open_checkpoint(ckpt, device)
        state = checkpoint.state
        given, told = remembered(given, [ckpt])
        console.tell(*told)
        sources = as_recorded(locate(given), checkpoint.sources)
        corpus, messages = open_corpus_of(checkpoint, sources)
        console.tell(*messages)
        documents: list[tuple[str, bytes]] = []
        if "documents" in wanted:  # found first, so that an error wastes no measurement
            with _documents_wanted(required=bool(only)):
                documents = _documents(sources, state)
        found = _measure(
            state,
            corpus,
            wanted,
            documents,
            batches=batches,
            iterations=iterations,
            windows=windows,
            required=bool(only),
        )
    value = {"checkpoint": str(ckpt), "step": state.step, **found}
    lines = [f"{ckpt.name}, after step {state.step}", *_lines(found, state, top)]
    console.result(value, lines, as_json=as_json)


def _refuse_idle_options(wanted: Sequence[str], as_json: bool) -> None:
    for option, parts in CONCERNS.items():
        if parts.isdisjoint(wanted):
            refuse_without_effect(f"on {' and '.join(wanted)}", option)
    if as_json:
        refuse_without_effect("with --json, which has all documents", "top")


@contextlib.contextmanager
def _documents_wanted(required: bool) -> Iterator[None]:
    """Let the other parts go on where no document can be measured, unless it is `required`."""
    try:
        yield
    except USER_ERRORS as error:
        if required:
            raise
        console.tell(f"no documents: {describe(error)}")


def _documents(sources: StreamBuildConfig, state: TrainState) -> list[tuple[str, bytes]]:
    from niels_gpt.analysis.influence import training_documents

    try:
        return training_documents(sources, state.train_cfg)
    except USER_ERRORS as error:
        raise ValueError(f"{describe(error)}; give --notes DIR or --text FILE|DIR") from error


def _measure(
    state: TrainState,
    corpus: Corpus,
    wanted: Sequence[str],
    documents: list[tuple[str, bytes]],
    *,
    batches: int,
    iterations: int,
    windows: int,
    required: bool,
) -> dict[str, Any]:
    """Measure the requested parts, by name."""
    from niels_gpt.analysis import influence, noise, sharpness

    found: dict[str, Any] = {}
    if "noise" in wanted:
        on_progress = console.progress("row")
        found["noise"] = noise.gradient_noise(state, corpus, batches, on_progress=on_progress)
    if "sharpness" in wanted:
        found["sharpness"] = sharpness.curvature(
            state, corpus, iterations=iterations, on_progress=console.progress("product")
        )
    if documents:
        with _documents_wanted(required):
            found["documents"] = influence.documents_worth(
                state,
                corpus.validation,
                documents,
                batches=batches,
                windows=windows,
                on_progress=console.progress("piece"),
            )
    return found


def _lines(found: dict[str, Any], state: TrainState, top: int) -> Iterator[str]:
    if "noise" in found:
        yield from _noise_lines(found["noise"], state)
    if "sharpness" in found:
        yield from _curvature_lines(found["sharpness"], state)
    if "documents" in found:
        yield from _worth_lines(found["documents"], state, top)


def _noise_lines(noise: NoiseScale, state: TrainState) -> list[str]:
    B, T = state.train_cfg.B, state.model_cfg.T
    lines = [
        "",
        f"gradient noise, from {noise.rows} rows of the next batches",
        f"  noise scale        {_rows(noise.scale)} (95 %: {_rows(noise.low)} to "
        f"{_rows(noise.high)}), {_rows(noise.scale * T)} bytes",
        _why("a step on so many rows makes half the progress of one with all text"),
        f"  {f'at B={B}':<19}a step makes {1 / (1 + noise.scale / B):.0%} of the progress of one "
        "with all text",
        _why(
            "a larger train.B would save steps where rows run in parallel"
            if noise.scale > B
            else "a larger train.B would hardly save steps, a smaller one saves text and time"
        ),
    ]
    if math.isinf(noise.high):
        return [*lines, "  the gradient is lost in the noise of so few rows: increase --batches"]
    suggested = max(1, round(noise.scale))
    return [
        *lines,
        f"  suggested          B = {suggested}: a run then takes twice the minimum steps "
        "and twice the minimum text",
    ]


def _why(sentence: str) -> str:
    """Return a line below a figure: what it means, or what to do about it."""
    return " " * 21 + sentence


def _rows(value: float) -> str:
    return "no bound" if math.isinf(value) else f"{value:,.0f}"


def _curvature_lines(curvature: Curvature, state: TrainState) -> list[str]:
    adam, adam_lr = curvature.adam, curvature.adam_lr
    lines = [
        "",
        f"sharpness, without dropout, on the next batch ({state.train_cfg.B} rows)",
        f"  Hessian            {_eigenvalue(curvature.plain)}; gradient descent is stable up to "
        f"lr {curvature.plain_lr:.3g}",
        _why("the sharper the loss bends, the smaller a step of plain descent must be"),
    ]
    if adam is None or adam_lr is None:
        why = "the checkpoint has no moments"
        if (optimizer := state.train_cfg.optimizer) != "adamw":
            why = f"the optimizer of the run is {optimizer}"
        lines += [f"  AdamW              unknown, because {why}"]
    else:
        lines += [
            f"  as AdamW sees it   {_eigenvalue(adam)}; AdamW is stable up to lr {adam_lr:.3g}",
            _why("above that rate the loss may jump or stop falling; it is a guide, not a wall"),
            f"  {'the rate here':<19}{curvature.lr:.3g} by the schedule",
            _why(
                "below the limit: a sweep tells whether a higher train.base_lr learns faster"
                if curvature.lr < adam_lr
                else "above the limit: lower train.base_lr if the loss jumps"
            ),
        ]
    if not all(found.converged for found in (curvature.plain, adam) if found):
        lines += ["  not converged: it may be larger, and the lr lower; increase --iterations"]
    return lines


def _eigenvalue(found: Eigenvalue) -> str:
    return f"largest eigenvalue {found.value:.4g} +- {found.error:.2g}"


def _worth_lines(worth: Sequence[Influence], state: TrainState, top: int) -> list[str]:
    judge, window = state.train_cfg.val_source, state.model_cfg.T + 1
    long = [d for d in worth if d.nbytes >= window]
    short = [d for d in worth if d.nbytes < window]
    lines = [
        "",
        f"{len(worth)} documents, by what a step on them does to the {judge} validation loss "
        f"(1: as good as {judge} text)",
        *_summary(worth),
        "  read what hurts: leave out what you do not want the model to learn",
    ]
    if long:
        ordered = sorted(long, key=lambda d: -d.value)
        lines += ["  help most", *map(_worth_line, ordered[:top])]
        lines += ["  help least, or hurt", *map(_worth_line, ordered[::-1][:top])]
    if short:
        lines += [
            f"  {len(short)} of fewer than {window:,} bytes, a window of the model, apart:",
            *_summary(short),
            "  so few bytes say little of one document: compare many of them, or none",
        ]
    return lines


def _summary(worth: Sequence[Influence]) -> list[str]:
    values = [d.value for d in worth]
    hurting, median = sum(value < 0 for value in values), statistics.median(values)
    return [f"  {hurting} of {len(values)} hurt; the median is {median:+.3f}"]


def _worth_line(document: Influence) -> str:
    return f"  {document.value:+8.3f}  {document.nbytes:>9,} bytes  {document.name}"
