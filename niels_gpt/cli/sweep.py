"""The `sweep` command: learning rates, weight decays and seeds in one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from niels_gpt.cli.shared.options import (
    CONFIG,
    HELP,
    PATH,
    device_option,
    json_option,
    mix_option,
    refuse_without_effect,
    set_option,
    source_options,
)
from niels_gpt.cli.shared.output import console, exit_on_failure
from niels_gpt.config import ConfigDocument, ModelConfig, TrainConfig, read_config
from niels_gpt.data.sources import Given

if TYPE_CHECKING:
    from niels_gpt.analysis.sweep import Cell, Cost, Result, Start, Suggestion
    from niels_gpt.corpus import Corpus


def _numbers(ctx: click.Context, param: click.Parameter, text: str | None) -> list[float] | None:
    """Parse "1e-4,3e-4"."""
    if text is None:
        return None
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 1e-4,3e-4") from None
    if len(set(numbers)) < len(numbers):
        raise click.BadParameter(f"{text!r} repeats a number; use --seeds N for more runs of each")
    return numbers


def _known(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Refuse nan, which no range does."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is not a number.")
    return value


@click.command(
    context_settings=HELP,
    epilog="Example: niels-gpt sweep --config quick --set train.total_steps=200 "
    "--lr 3e-4,1e-3,3e-3 --seeds 2",
)
@click.option(
    "--config", type=CONFIG, required=True, metavar="FILE", help="JSON config, or a bare name."
)
@set_option
@click.option("--from", "parent", type=PATH, metavar="PATH", help="Begin with its weights.")
@click.option("--lr", "lrs", required=True, callback=_numbers, metavar="A,B,...", help="base_lr.")
@click.option("--weight-decay", "decays", callback=_numbers, metavar="A,B,...")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, metavar="N")
@source_options
@mix_option
@device_option("cpu")
@click.option(
    "--memory",
    type=click.FloatRange(0, 1e9),
    callback=_known,
    metavar="GB",
    help="Memory limit (default: half of what is available).",
)
@click.option(
    "--solo/--together",
    default=None,
    help="One model after another, or all at once by vmap (default: what is faster here).",
)
@click.option("--dry-run", is_flag=True, help="Only estimate memory and time.")
@click.option("--picture", type=PATH, multiple=True, metavar="FILE", help="Picture, .png or .svg.")
@json_option()
def main(
    config: str,
    overrides: tuple[str, ...],
    parent: Path | None,
    lrs: list[float],
    decays: list[float] | None,
    seeds: int,
    given: Given,
    device: str,
    memory: float | None,
    solo: bool | None,
    dry_run: bool,
    picture: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Train a model for each learning rate, weight decay and seed, and compare them.

    All models of a group are trained at once where that is faster. Seeds count up from the
    config's; they change initial weights, batches and dropout, not the text. `min_lr` keeps its
    ratio to the learning rate.
    """
    _refuse_without_effect(dry_run, solo)
    with exit_on_failure(2, busy="reading the text"):
        from niels_gpt.analysis import plot, sweep
        from niels_gpt.corpus import as_given, open_corpus

        plot.check_pictures(picture)
        document = read_config(config)
        model_cfg, cfg, start = _begin(document, overrides, parent, device)
        cfg, where = as_given(cfg, given, document, overrides)
        every_seed = range(cfg.seed, cfg.seed + seeds)
        cfgs = sweep.grid(cfg, lrs, decays or [cfg.weight_decay], every_seed)
        corpus = open_corpus(model_cfg, cfg, where)
        console.tell(*corpus.messages)
        groups = _groups(model_cfg, cfgs, memory)
        cost = sweep.cost(model_cfg, groups, corpus, device, solo=solo)
    if dry_run:
        return console.result({"cost": cost}, [_cost_line(cost)], as_json=as_json)
    console.warn(_cost_line(cost))
    with exit_on_failure(1):
        found = _train(model_cfg, groups, corpus, start, device, cost.solo)
        facts = plot.facts(model_cfg, cfg, corpus.train)
        _report(cost, found, picture, facts, as_json)


def _begin(
    document: ConfigDocument, overrides: tuple[str, ...], parent: Path | None, device: str
) -> tuple[ModelConfig, TrainConfig, Start]:
    """Load the configs; also return how a model begins: drawn, or with the weights of `parent`."""
    from niels_gpt.checkpoint import open_checkpoint
    from niels_gpt.state import make_state

    if parent is None:
        return *document.configs(overrides), make_state
    found = open_checkpoint(parent, device)
    model_cfg, cfg = document.configs(overrides, model=found.model_cfg)
    found.start_under(model_cfg, cfg)  # refuses another shape
    return model_cfg, cfg, lambda model_cfg, cfg, device: found.start_under(model_cfg, cfg)


def _refuse_without_effect(dry_run: bool, solo: bool | None) -> None:
    if dry_run:
        refuse_without_effect("with --dry-run", "picture")
    if solo:
        refuse_without_effect("with --solo, which trains one model at a time", "memory")


def _groups(
    model_cfg: ModelConfig, cfgs: list[TrainConfig], memory: float | None
) -> list[list[TrainConfig]]:
    """Split into groups that fit into the memory limit, in GB (None: half of what is available)."""
    from niels_gpt.analysis import sweep
    from niels_gpt.units import size

    budget = sweep.memory_budget() if memory is None else int(memory * 1e9)
    each = sweep.member_bytes(model_cfg, cfgs[0].B)
    if each > budget:
        console.tell(
            f"one model alone takes about {size(each)}, more than the {size(budget)} allowed"
        )
    return sweep.groups(cfgs, each, budget)


def _train(
    model_cfg: ModelConfig,
    groups: list[list[TrainConfig]],
    corpus: Corpus,
    start: Start,
    device: str,
    solo: bool,
) -> list[Result]:
    """Train every model and evaluate all on the same batches of the validation text."""
    from niels_gpt.analysis import sweep

    train = sweep.train_alone if solo else sweep.train_together
    found = []
    for group in groups:
        shown = console.progress("step")
        states = train(model_cfg, group, corpus, device, start=start, on_step=shown)
        found += sweep.results(states, corpus.validation, corpus.seed)
    return found


def _report(
    cost: Cost,
    found: list[Result],
    pictures: tuple[Path, ...],
    facts: list[str],
    as_json: bool,
) -> None:
    """Print the results, and draw them under these facts about the models."""
    from niels_gpt.analysis import plot, sweep

    cells = sweep.cells(found)
    best = sweep.suggest(cells)
    value = {"cost": cost, "results": found, "cells": cells, "suggestion": best}
    console.result(value, _lines(cells, best), as_json=as_json)
    if pictures:
        plot.save_figure(lambda: sweep.draw(found, ["sweep of learning rates", *facts]), pictures)


def _cost_line(cost: Cost) -> str:
    from niels_gpt.units import duration, size

    ratio = cost.seconds_per_step / cost.seconds_per_step_alone
    way = "one by one" if cost.solo else f"in {cost.groups} group{'s' if cost.groups > 1 else ''}"
    models = f"{cost.models} model{'s' if cost.models > 1 else ''}"
    return (
        f"{models} {way}: about {size(cost.bytes_at_once)} of memory, "
        f"{duration(cost.seconds)} of training; a step of a group takes "
        f"{cost.seconds_per_step:.3g} s together, {cost.seconds_per_step_alone:.3g} s one by one "
        f"(ratio {ratio:.2f})"
    )


def _lines(cells: Sequence[Cell], best: Suggestion | None) -> list[str]:
    lines = [f"{'weight decay':>12}  {'lr':>9}  {'val nats':>8}  {'spread':>7}  seeds"]
    lines += [_row(cell) for cell in cells]
    if best is None:
        return [*lines, "every learning rate diverged: try lower ones"]
    chosen = best.best
    return [
        *lines,
        f"suggested: lr {chosen.lr:g}, weight decay {chosen.weight_decay:g}",
        *(f"note: {message}" for message in best.messages),
    ]


def _row(cell: Cell) -> str:
    nats = "diverged" if math.isinf(cell.mean) else f"{cell.mean:.4f}"
    spread = "-" if cell.spread is None else f"{cell.spread:.4f}"
    seeds = f"{cell.diverged} of {cell.seeds} diverged" if cell.diverged else f"{cell.seeds}"
    return f"{cell.weight_decay:>12g}  {cell.lr:>9g}  {nats:>8}  {spread:>7}  {seeds}"
