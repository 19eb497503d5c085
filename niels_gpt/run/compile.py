"""The step with parts compiled by `torch.compile`, checked before use.

The compiled parts are a block of the model, one for all L, because they differ in their weights
alone, and `optim.update`. What is around them stays eager: the embedding, the last products and the
loop over blocks of rows.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from niels_gpt import optim
from niels_gpt.config import ModelConfig
from niels_gpt.loss import Batch, direct_block_gradients, gradients
from niels_gpt.model.blocks import Block
from niels_gpt.model.gpt import GPT, without_storage
from niels_gpt.optim.trees import Tree, tree_difference
from niels_gpt.state import TrainState
from niels_gpt.step import (
    GradientFunction,
    StepFunction,
    UpdateFunction,
    dropout_of_step,
    loop_step,
    train_step,
)

TOLERANCE = 1e-3  # of the largest element of each tensor; rounding gives about 1e-5


def compile_step() -> StepFunction:
    """Return `train_step` with compiled parts; compilation happens on the first call."""
    gradients, update = compile_parts()
    return partial(train_step, gradients=gradients, update=update)


def compile_parts() -> tuple[GradientFunction, UpdateFunction]:
    """Return `gradients` and `optim.update`, compiled."""
    forward: Callable[..., Any] = torch.compile(Block.forward, dynamic=False, fullgraph=True)
    of_numbers = torch.compile(optim.update, dynamic=False, fullgraph=True)

    @cache
    def with_compiled_blocks(cfg: ModelConfig) -> GPT:
        model = without_storage(cfg).eval()
        for block in model.blocks:
            block.forward = partial(forward, block)
        return model

    def of_block(
        params: Tree, block: Batch, keys: Tensor | None, model: GPT, B: int
    ) -> tuple[Tree, Tensor]:
        return direct_block_gradients(params, block, keys, with_compiled_blocks(model.cfg), B)

    def update(*trees: Any, count: int, lr: float | Tensor, **fixed: Any) -> Any:
        """Pass values that change every step as tensors: numbers would be compiled in."""
        return of_numbers(*trees, count=torch.tensor(count), lr=torch.as_tensor(lr), **fixed)

    return partial(gradients, of_block=of_block), update


def step_difference(
    state: TrainState, batch: Batch, parts: tuple[GradientFunction, UpdateFunction]
) -> float:
    """Return how far these `gradients` and `optim.update` differ from the eager ones.

    Updates are compared on equal gradients, because dividing by their size amplifies rounding.
    """
    compiled_gradients, update = parts
    cfg, rows, device = state.train_cfg, range(len(batch[0])), batch[0].device
    drop = dropout_of_step(cfg.seed, state.step, rows, state.model_cfg, device)
    expected, _ = gradients(state.params, batch, state.model_cfg, drop)
    found = compiled_gradients(state.params, batch, state.model_cfg, drop)
    lr = cfg.base_lr  # the rate of a first step can be 0, which would hide any difference
    eager, compiled = (
        train_step(state, batch, lr, gradients=lambda *_: found, update=each)[0].trees()
        for each in (optim.update, update)
    )
    pairs = [(expected, found[0]), *((eager[name], compiled[name]) for name in eager)]
    return torch.stack([tree_difference(a, b) for a, b in pairs]).max().item()


def choose_step(
    state: TrainState, batch: Batch, say: Callable[[str], None]
) -> tuple[StepFunction, bool]:
    """Compile the step and compare it with the eager one on a batch; fall back if they differ.

    Returns:
        The step to use, and whether it is the compiled one.
    """
    gradients, update = parts = compile_parts()
    try:
        difference = step_difference(state, batch, parts)
    except Exception as error:  # compilers may raise anything
        say(f"compile: failed, using the eager step: {type(error).__name__}: {_first_line(error)}")
        return loop_step, False
    if not difference <= TOLERANCE:
        say(f"compile: not used; the compiled step differs by {difference:.1e} from the eager one")
        return loop_step, False
    say(f"compile: used; the compiled step differs by {difference:.1e} from the eager one")
    return partial(train_step, gradients=gradients, update=update), True


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
