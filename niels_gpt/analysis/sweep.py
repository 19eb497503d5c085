"""Learning rates, weight decays and seeds trained together, as one run under `vmap`.

M models of one shape form one state whose tensors have a leading axis M. Each model has its own
schedule, decay, batches and dropout, which are mapped arguments of the parts of the step.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from niels_gpt import optim
from niels_gpt.analysis.plot import COLOURS, MARKERS, write_title
from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.corpus import Corpus, advance
from niels_gpt.device import available_memory
from niels_gpt.eval import evaluate
from niels_gpt.loss import Batch, gradients, rows_per_block
from niels_gpt.lr_schedule import lr_of_step
from niels_gpt.model.flops import parameter_count
from niels_gpt.optim import OptState, optimizer_of
from niels_gpt.optim.trees import Tree, map_tensors
from niels_gpt.state import TrainState, make_state
from niels_gpt.step import dropout_of_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OnStep = Callable[[int, int], object]  # called with (done, total) steps of all models
Start = Callable[[ModelConfig, TrainConfig, str], TrainState]  # as `make_state`

TIMED_STEPS = 2
MAX_MODELS = 10_000
FLOAT_BYTES = 4


# --- the grid ----------------------------------------------------------------------------------


def grid(
    cfg: TrainConfig, lrs: Sequence[float], decays: Sequence[float], seeds: Sequence[int]
) -> list[TrainConfig]:
    """Return the config of each model: every lr with every decay and seed, seeds varying fastest.

    `min_lr` keeps its ratio to `base_lr`.

    Raises:
        ValueError: for a learning rate that is 0 or invalid in a config, and for more than
            `MAX_MODELS` models.
    """
    most = MAX_MODELS // (len(lrs) * len(decays))
    if len(seeds[: most + 1]) > most:  # the length of a long range does not fit into a machine word
        raise ValueError(f"a sweep has at most {MAX_MODELS:,} models: give fewer seeds or values")
    if 0 in lrs:
        raise ValueError("lr=0 must be above 0")
    ratio = cfg.min_lr / cfg.base_lr if cfg.base_lr else 0.0
    return [
        replace(cfg, base_lr=lr, min_lr=lr * ratio, weight_decay=decay, seed=seed)
        for lr in lrs
        for decay in decays
        for seed in seeds
    ]


def member_bytes(model_cfg: ModelConfig, B: int) -> int:
    """Estimate the memory that one model needs during training.

    Two states (old and new), three trees of gradients, and the activations of the rows that are
    differentiated at a time. Measured peaks at C from 32 to 256 were 1 to 40 % lower.
    """
    L, C, T = model_cfg.L, model_cfg.C, model_cfg.T
    positions = min(B, rows_per_block(T)) * T
    per_block = 32 * C + 8 * model_cfg.d_ff + 6 * model_cfg.H * T
    activations = positions * (L * per_block + 8 * model_cfg.V)
    return FLOAT_BYTES * (9 * parameter_count(model_cfg) + activations)


def groups(members: Sequence[TrainConfig], each: int, budget: int) -> list[list[TrainConfig]]:
    """Split into the fewest groups that fit, of nearly equal size and at least one model."""
    most = max(1, budget // each)
    count = math.ceil(len(members) / most)
    ends = [round(i * len(members) / count) for i in range(count + 1)]
    return [list(members[a:b]) for a, b in pairwise(ends)]


def memory_budget() -> int:
    """Return half of the memory that this process may use."""
    return available_memory() // 2


# --- many states as one ------------------------------------------------------------------------


def stack(states: Sequence[TrainState]) -> TrainState:
    """Stack states of one shape and step; the train config is the first one's."""
    stacked: TrainState = map_tensors(lambda *members: torch.stack(members), *states)
    return stacked


def unstack(stacked: TrainState, cfgs: Sequence[TrainConfig]) -> list[TrainState]:
    """Split a stack into states, each with its own config."""
    return [
        map_tensors(lambda x, i=i: x[i], stacked)._replace(train_cfg=cfg)
        for i, cfg in enumerate(cfgs)
    ]


def stacked_step(
    stacked: TrainState, batch: Batch, keys: Tensor | None, lr: Tensor, weight_decay: Tensor
) -> tuple[TrainState, Tensor]:
    """Take one step of all models; return the new stack and the losses before it, (M,).

    Args:
        batch: x and y, each (M, B, T).
        keys: dropout keys, (M, B, S, 2).
        lr, weight_decay: (M,).
    """
    params, opt_state, done, model_cfg, cfg = stacked

    def step(
        params: Tree,
        opt_state: OptState,
        batch: Batch,
        keys: Tensor | None,
        lr: Tensor,
        weight_decay: Tensor,
    ) -> tuple[Tree, OptState, Tensor]:
        grads, loss = gradients(params, batch, model_cfg, keys)
        new_params, new_state, _ = optim.update(
            optimizer_of(cfg),
            params,
            grads,
            opt_state,
            count=done + 1,
            lr=lr,
            weight_decay=weight_decay,
            max_norm=cfg.grad_clip,
        )
        return new_params, new_state, loss

    mapped = vmap(step, in_dims=(0, 0, 0, None if keys is None else 0, 0, 0))
    params, opt_state, losses = mapped(params, opt_state, batch, keys, lr, weight_decay)
    return TrainState(params, opt_state, done + 1, model_cfg, cfg), losses


def advance_all(
    stacked: TrainState, cfgs: Sequence[TrainConfig], corpus: Corpus
) -> tuple[TrainState, Tensor]:
    """Take the next step of every model, each with its own config."""
    k, model_cfg = stacked.step, stacked.model_cfg
    device = stacked.device
    seeds = {cfg.seed: cfg for cfg in cfgs}  # models with the same seed share its draws
    batches = {seed: replace(corpus, seed=seed).batch(k, device) for seed in seeds}
    drawn = {
        seed: dropout_of_step(seed, k, range(cfg.B), model_cfg, device)
        for seed, cfg in seeds.items()
    }
    x, y = (torch.stack([batches[cfg.seed][i] for cfg in cfgs]) for i in (0, 1))
    keys = [key for cfg in cfgs if (key := drawn[cfg.seed]) is not None]
    lr = torch.tensor([lr_of_step(k, cfg) for cfg in cfgs], device=device)
    decay = torch.tensor([cfg.weight_decay for cfg in cfgs], device=device)
    return stacked_step(stacked, (x, y), torch.stack(keys) if keys else None, lr, decay)


# --- training ----------------------------------------------------------------------------------


def train_together(
    model_cfg: ModelConfig,
    cfgs: Sequence[TrainConfig],
    corpus: Corpus,
    device: str = "cpu",
    *,
    start: Start = make_state,
    on_step: OnStep = lambda done, total: None,
) -> list[TrainState]:
    """Train a model for each config, all at once; return their final states."""
    stacked = stack([start(model_cfg, cfg, device) for cfg in cfgs])
    total = cfgs[0].total_steps
    while stacked.step < total:
        stacked, _ = advance_all(stacked, cfgs, corpus)
        on_step(stacked.step * len(cfgs), total * len(cfgs))
    return unstack(stacked, cfgs)


def train_alone(
    model_cfg: ModelConfig,
    cfgs: Sequence[TrainConfig],
    corpus: Corpus,
    device: str = "cpu",
    *,
    start: Start = make_state,
    on_step: OnStep = lambda done, total: None,
) -> list[TrainState]:
    """Like `train_together`, but one model after another with `train_step`, without `vmap`."""
    return [
        _train_one(
            start(model_cfg, cfg, device),
            replace(corpus, seed=cfg.seed),
            i,
            len(cfgs),
            on_step,
        )
        for i, cfg in enumerate(cfgs)
    ]


def _train_one(
    state: TrainState, corpus: Corpus, before: int, models: int, on_step: OnStep
) -> TrainState:
    total = state.train_cfg.total_steps
    while state.step < total:
        state, _ = advance(state, corpus)
        on_step(before * total + state.step, models * total)
    return state


class Cost(NamedTuple):
    """The estimated cost of a sweep."""

    models: int
    groups: int
    solo: bool  # one model after another
    bytes_at_once: int
    seconds_per_step: float  # of the first group
    seconds_per_step_alone: float  # of the same models one by one
    seconds: float  # of the sweep, without evaluations


def cost(
    model_cfg: ModelConfig,
    parts: Sequence[Sequence[TrainConfig]],
    corpus: Corpus,
    device: str,
    *,
    solo: bool | None,
) -> Cost:
    """Estimate the cost of a sweep of these groups by timing a few steps both ways.

    Args:
        solo: whether to train one model after another; None: if that is faster.
    """
    first = parts[0]
    stacked = stack([make_state(model_cfg, cfg, device) for cfg in first])
    state = make_state(model_cfg, first[0], device)
    together = _seconds(lambda: advance_all(stacked, first, corpus)[1].sum().item())
    alone = _seconds(lambda: advance(state, corpus)[1]["loss"].item()) * len(first)
    solo = alone < together if solo is None else solo
    models = sum(len(part) for part in parts)
    steps = first[0].total_steps * models / len(first)
    return Cost(
        models=models,
        groups=len(parts),
        solo=solo,
        bytes_at_once=member_bytes(model_cfg, first[0].B) * (1 if solo else len(first)),
        seconds_per_step=together,
        seconds_per_step_alone=alone,
        seconds=steps * (alone if solo else together),
    )


def _seconds(action: Callable[[], object]) -> float:
    action()  # excludes one-time costs
    start = time.perf_counter()
    for _ in range(TIMED_STEPS):
        action()
    return (time.perf_counter() - start) / TIMED_STEPS


# --- results -----------------------------------------------------------------------------------


class Result(NamedTuple):
    """One model of a sweep."""

    lr: float
    weight_decay: float
    seed: int
    val_loss: float  # nats, after the last step; not finite if the model diverged


class Cell(NamedTuple):
    """The models with one learning rate and decay, summarised over seeds."""

    lr: float
    weight_decay: float
    mean: float  # nats; infinite if a seed diverged
    spread: float | None  # standard deviation over seeds, None for one seed
    seeds: int
    diverged: int


def results(states: Sequence[TrainState], stream: bytes, seed: int) -> list[Result]:
    """Evaluate each model on the same batches of a stream."""
    return [
        Result(
            state.train_cfg.base_lr,
            state.train_cfg.weight_decay,
            state.train_cfg.seed,
            evaluate(state, stream, seed),
        )
        for state in states
    ]


def cells(found: Sequence[Result]) -> list[Cell]:
    """Summarise over seeds, sorted by weight decay and then learning rate."""
    losses: dict[tuple[float, float], list[float]] = {}
    for r in found:
        losses.setdefault((r.weight_decay, r.lr), []).append(r.val_loss)
    return [_cell(lr, decay, nats) for (decay, lr), nats in sorted(losses.items())]


def _cell(lr: float, decay: float, nats: list[float]) -> Cell:
    diverged = sum(not math.isfinite(x) for x in nats)
    if diverged:
        return Cell(lr, decay, math.inf, None, len(nats), diverged)
    spread = statistics.stdev(nats) if len(nats) > 1 else None
    return Cell(lr, decay, statistics.fmean(nats), spread, len(nats), 0)


class Suggestion(NamedTuple):
    """The best of a sweep."""

    best: Cell
    messages: list[str]


def suggest(found: Sequence[Cell]) -> Suggestion | None:
    """Choose the lowest mean, with caveats; None if every cell diverged."""
    best = min(found, key=lambda cell: cell.mean)
    if math.isinf(best.mean):
        return None
    messages = [
        f"the best {what} lies at the {end} end of the grid: the optimum may lie beyond"
        for what, value, values in (
            ("lr", best.lr, [cell.lr for cell in found]),
            ("weight decay", best.weight_decay, [cell.weight_decay for cell in found]),
        )
        for end, at_end in (("lower", min(values)), ("upper", max(values)))
        if value == at_end and len(set(values)) > 1
    ]
    if best.spread is not None:
        messages += [
            f"lr {c.lr:g} with weight decay {c.weight_decay:g} is as good within the seed spread"
            for c in found
            if c is not best and c.mean - best.mean <= max(best.spread, c.spread or 0.0)
        ]
    return Suggestion(best, messages)


def draw(found: Sequence[Result], title: Sequence[str] = ()) -> Figure:
    """Draw the loss against the learning rate: seeds as dots, a line per weight decay for the mean.

    The ticks are the rates that were tried, and the suggestion has a ring. A rate at which a seed
    diverged has a cross at the top edge.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    summary = cells(found)
    for number, decay in enumerate(sorted({r.weight_decay for r in found})):
        _draw_decay(axes, decay, found, number)
    if (best := suggest(summary)) is not None:
        ring: dict[str, Any] = {
            "ls": "",
            "marker": "o",
            "ms": 15,
            "mfc": "none",
            "mec": "black",
            "mew": 1.5,
        }
        label = f"suggested: lr {best.best.lr:g}, {best.best.mean:.3f} nats"
        axes.plot([best.best.lr], [best.best.mean], label=label, **ring)
    if lost := sorted({c.lr for c in summary if c.diverged}):
        on_edge = axes.get_xaxis_transform()
        axes.plot(lost, [0.97] * len(lost), "kx", ms=8, transform=on_edge, label="diverged")
    _label_axes(axes, sorted({r.lr for r in found}))
    axes.legend()
    if title:
        write_title(figure, axes, title)
    return figure


def _draw_decay(axes: Axes, decay: float, found: Sequence[Result], number: int) -> None:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    seeds = [r for r in found if r.weight_decay == decay and math.isfinite(r.val_loss)]
    dots = [r.lr for r in seeds], [r.val_loss for r in seeds]
    axes.plot(*dots, ls="", marker=marker, ms=5, alpha=0.6, color=colour)
    line = [c for c in cells(found) if c.weight_decay == decay and not c.diverged]
    label = f"weight decay {decay:g}" if line else ""
    axes.plot([c.lr for c in line], [c.mean for c in line], color=colour, lw=2, label=label)


def _label_axes(axes: Axes, rates: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45 if len(rates) > 8 else 0)
    axes.minorticks_off()
    axes.margins(x=0.08, y=0.1)
    axes.set_xlabel("learning rate (base_lr)")
    axes.set_ylabel("validation loss (nats per byte)")
