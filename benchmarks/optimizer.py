"""The share of an optimizer's update in a step, beside an eager and a compiled gradient.

python -m benchmarks.optimizer
"""

from __future__ import annotations

from collections.abc import Callable

import click
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sides import random_batch
from benchmarks.timing import describe_machine, median_seconds
from niels_gpt import TrainState, make_state, optim
from niels_gpt.config import OPTIMIZERS, ModelConfig, TrainConfig
from niels_gpt.device import keep_freed_memory
from niels_gpt.loss import gradients
from niels_gpt.model.flops import step_flops
from niels_gpt.optim import optimizer_of
from niels_gpt.run.compile import compile_gradients
from niels_gpt.step import dropout_of_step

WIDTHS = (128, 256, 384)


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Default: torch's own choice.")
@click.option("--width", "widths", type=int, multiple=True, default=WIDTHS, show_default=True)
@click.option("--no-compile", is_flag=True, help="Only the eager step; the compiled takes minutes.")
def main(rounds: int, threads: int | None, widths: tuple[int, ...], no_compile: bool) -> None:
    """Print seconds and shares for the default model at other widths, and Muon's operations."""
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    click.echo(", ".join(f"{key} {value}" for key, value in describe_machine().items()))
    for C in widths:
        model_cfg = ModelConfig(C=C, d_ff=4 * C)
        for name in OPTIMIZERS:
            flops, step = update_flops(model_cfg, name), step_flops(model_cfg, B=TrainConfig().B)
            click.echo(f"C={C} {name:6s} {flops / 1e9:6.2f} GFLOP, {flops / step:5.1%} of a step's")
        for compiled in (False,) if no_compile else (False, True):
            seconds = median_seconds(sides(model_cfg, compiled=compiled), rounds=rounds)
            form = "compiled" if compiled else "eager"
            for name in OPTIMIZERS:
                share = seconds[name] / (seconds[name] + seconds["gradients"])
                click.echo(
                    f"C={C} {name:6s} {form:8s} {seconds[name]:.4f} s, {share:5.1%} of a step"
                )


def sides(model_cfg: ModelConfig, *, compiled: bool) -> dict[str, Callable[[], object]]:
    """Return the gradient, and the update of each optimizer, as callables."""
    differentiate = compile_gradients() if compiled else gradients
    cfg = TrainConfig()
    batch = random_batch(model_cfg, cfg)
    params = make_state(model_cfg, cfg).params
    drop = dropout_of_step(cfg.seed, 0, range(cfg.B), model_cfg)

    def updating(state: TrainState) -> Callable[[], object]:
        return lambda: run_update(state)

    return {
        "gradients": lambda: differentiate(params, batch, model_cfg, drop),
        **{
            name: updating(make_state(model_cfg, TrainConfig(optimizer=name)))
            for name in OPTIMIZERS
        },
    }


def run_update(state: TrainState) -> object:
    """Update with the parameters as gradients: the cost does not depend on values."""
    cfg = state.train_cfg
    trees = state.params, state.params, state.opt_state
    return optim.update(
        optimizer_of(cfg),
        *trees,
        count=1,
        lr=cfg.base_lr,
        weight_decay=cfg.weight_decay,
        max_norm=cfg.grad_clip,
    )


def update_flops(model_cfg: ModelConfig, name: str) -> int:
    """Count the operations of the matrix products in an update."""
    with FlopCounterMode(display=False) as counter:
        run_update(make_state(model_cfg, TrainConfig(optimizer=name)))
    return int(counter.get_total_flops())


if __name__ == "__main__":
    main()
