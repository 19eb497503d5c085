"""The `inspect` command: what one checkpoint tells about its training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from niels_gpt.cli.shared.options import HELP, PATH, Places, source_options
from niels_gpt.cli.shared.output import console, describe, exit_on_failure

if TYPE_CHECKING:
    from niels_gpt.analysis.influence import Influence
    from niels_gpt.analysis.noise import NoiseScale
    from niels_gpt.analysis.sharpness import Curvature, Eigenvalue
    from niels_gpt.state import TrainState

PARTS = ("noise", "sharpness", "documents")


@click.command(
    context_settings=HELP,
    epilog="Example: niels-gpt inspect --ckpt checkpoints/best.pt --roam ~/notes --only documents",
)
@click.option("--ckpt", type=PATH, required=True, metavar="PATH", help="Checkpoint.")
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="This part, not all three.")
@source_options
@click.option("--batches", type=click.IntRange(1), default=4, show_default=True, metavar="N")
@click.option(
    "--iterations",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    metavar="N",
    help="Most Hessian products for each sharpness.",
)
@click.option(
    "--windows",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    metavar="N",
    help="Most pieces scored of each note.",
)
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, metavar="N")
@click.option("--device", default="cpu", metavar="NAME", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, all notes in it.")
def main(
    ckpt: Path,
    only: tuple[str, ...],
    places: Places,
    batches: int,
    iterations: int,
    windows: int,
    top: int,
    device: str,
    as_json: bool,
) -> None:
    """Measure gradient noise, sharpness, and which notes help or hurt, at one checkpoint.

    noise: the batch size beyond which rows are wasted, from the next batches of the run.

    sharpness: the largest curvature of the loss, and the learning rate that it bears.

    documents: the notes on which a step lowers the wiki validation loss most, and least.
    """
    with exit_on_failure(2):
        from niels_gpt.analysis import influence, noise, sharpness
        from niels_gpt.analysis.replay import open_corpus_of
        from niels_gpt.checkpoint import load_state
        from niels_gpt.device import resolve_device
        from niels_gpt.streams import locate

        state, payload = load_state(ckpt, device=resolve_device(device))
        sources = locate(places)
        corpus, messages = open_corpus_of(payload, ckpt, state, sources)
        console.tell(*messages)
        wanted = only or PARTS
        documents = []
        if "documents" in wanted:
            try:
                documents = influence.training_notes(sources, state.train_cfg.seed)
            except (ValueError, OSError) as error:
                if only:
                    raise
                wanted = tuple(part for part in wanted if part != "documents")
                console.tell(f"no documents: {describe(error)}; give --roam DIR")
        found: dict[str, Any] = {"checkpoint": str(ckpt), "step": state.step}
        lines = [f"{ckpt.name}, after step {state.step}"]
        if "noise" in wanted:
            rows, drop = noise.next_rows(state, corpus, batches)
            products = noise.row_products(
                state.params, rows, state.model_cfg, drop, on_progress=console.progress("row")
            )
            found["noise"] = scale = noise.noise_scale(*products)
            lines += _noise_lines(scale, state)
        if "sharpness" in wanted:
            found["sharpness"] = curvature = sharpness.curvature(
                state, corpus, iterations=iterations, on_progress=console.progress("product")
            )
            lines += _curvature_lines(curvature, state)
        if "documents" in wanted:
            found["documents"] = worth = influence.notes_worth(
                state,
                corpus.val["wiki"],
                documents,
                batches=batches,
                windows=windows,
                on_progress=console.progress("piece"),
            )
            lines += _worth_lines(worth, top)
    console.result(found, lines, as_json=as_json)


def _noise_lines(noise: NoiseScale, state: TrainState) -> list[str]:
    B, T = state.train_cfg.B, state.model_cfg.T
    lines = [
        "",
        f"gradient noise, from {noise.rows} rows of the next batches",
        f"  noise scale        {_rows(noise.scale)} (95 %: {_rows(noise.low)} to "
        f"{_rows(noise.high)}), {_rows(noise.scale * T)} bytes",
        f"  {f'at B={B}':<19}a step makes {1 / (1 + noise.scale / B):.0%} of the progress of one "
        "with all text",
    ]
    if math.isinf(noise.high):
        return [*lines, "  the gradient is lost in the noise of so few rows: raise --batches"]
    suggested = max(1, round(noise.scale))
    return [
        *lines,
        f"  suggested          B = {suggested}: a run then takes twice the fewest steps "
        "and twice the least text",
    ]


def _rows(value: float) -> str:
    return "no bound" if math.isinf(value) else f"{value:,.0f}"


def _curvature_lines(curvature: Curvature, state: TrainState) -> list[str]:
    adam, adam_lr = curvature.adam, curvature.adam_lr
    lines = [
        "",
        f"sharpness, without dropout, on the next batch ({state.train_cfg.B} rows)",
        f"  Hessian            {_eigenvalue(curvature.plain)}; gradient descent is stable up to "
        f"lr {curvature.plain_lr:.3g}",
    ]
    if adam is None or adam_lr is None:
        lines += ["  AdamW              the checkpoint has no moments, so not known"]
    else:
        lines += [
            f"  as AdamW sees it   {_eigenvalue(adam)}; AdamW is stable up to lr {adam_lr:.3g}",
            f"                     the schedule's lr here is {curvature.lr:.3g}; see the caveats "
            "in docs/inspect.md",
        ]
    if not all(found.converged for found in (curvature.plain, adam) if found):
        lines += ["  not converged: it may be larger, and the lr lower; raise --iterations"]
    return lines


def _eigenvalue(found: Eigenvalue) -> str:
    return f"largest eigenvalue {found.value:.4g} +- {found.error:.2g}"


def _worth_lines(worth: Sequence[Influence], top: int) -> list[str]:
    ordered = sorted(worth, key=lambda d: -d.value)
    helpful, harmful = ordered[:top], ordered[::-1][:top]
    hurting = sum(d.value < 0 for d in worth)
    return [
        "",
        f"{len(worth)} notes, by what a step on them does to the wiki validation loss "
        "(1: as good as wiki text)",
        f"  {hurting} hurt; the middle one has {ordered[len(ordered) // 2].value:+.3f}",
        "  help most",
        *map(_worth_line, helpful),
        "  help least, or hurt",
        *map(_worth_line, harmful),
    ]


def _worth_line(document: Influence) -> str:
    return f"  {document.value:+8.3f}  {document.nbytes:>9,} bytes  {document.name}"
