"""The step with its gradient compiled by `torch.compile`, checked before use.

What is compiled is a block of the model, one for all L, because they differ in their weights alone.
What is around the blocks stays eager: the embedding, the last products, the loop over blocks of
rows. So does the update: compiling it takes ten seconds and saves half a hundredth of a step.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from niels_gpt.config import ModelConfig
from niels_gpt.loss import Batch, direct_block_gradients, gradients, rows_per_block
from niels_gpt.model.blocks import Block
from niels_gpt.model.gpt import GPT, without_storage
from niels_gpt.optim.trees import Tree, tree_difference
from niels_gpt.state import TrainState
from niels_gpt.step import GradientFunction, StepFunction, dropout_of_step, loop_step, train_step

# The compiler would first try, in five seconds, whether C++ for this processor can be compiled at
# all. If it cannot, the compilation fails, which `choose_step` expects.
OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"cpp.vec_isa_ok": True}
TOLERANCE = 1e-3  # of the largest element of each tensor; rounding gives about 1e-5


def compile_step() -> StepFunction:
    """Return `train_step` with a compiled gradient; compilation happens on the first call."""
    return partial(train_step, gradients=compile_gradients())


def compile_gradients() -> GradientFunction:
    """Return `gradients` with compiled blocks; compilation happens on the first call.

    For one thread at a time, because the calls share a module, whose weights they exchange.
    """
    forward: Callable[..., Any] = torch.compile(
        Block.forward, dynamic=False, fullgraph=True, options=OPTIONS
    )

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

    return partial(gradients, of_block=of_block)


def difference(state: TrainState, batch: Batch, compiled: GradientFunction) -> float:
    """Return how far this `gradients` differs from the eager one, on a block of rows of each size.

    Relative to the largest element of each tensor.
    """
    rows = rows_per_block(batch[0].shape[1])
    rows = min(len(batch[0]), rows + len(batch[0]) % rows)
    some = batch[0][:rows], batch[1][:rows]
    cfg, model_cfg = state.train_cfg, state.model_cfg
    drop = dropout_of_step(cfg.seed, state.step, range(rows), model_cfg, some[0].device)
    expected, found = (each(state.params, some, model_cfg, drop) for each in (gradients, compiled))
    return tree_difference(expected[0], found[0]).item()


def choose_step(
    state: TrainState, batch: Batch, say: Callable[[str], None]
) -> tuple[StepFunction, bool]:
    """Compile the step and compare it with the eager one on a batch; fall back if they differ.

    Returns:
        The step to use, and whether it is the compiled one.
    """
    compiled = compile_gradients()
    try:
        found = difference(state, batch, compiled)
    except Exception as error:  # compilers may raise anything
        say(f"compile: failed, using the eager step: {type(error).__name__}: {_first_line(error)}")
        return loop_step, False
    if not found <= TOLERANCE:
        say(f"compile: not used; the compiled step differs by {found:.1e} from the eager one")
        return loop_step, False
    say(f"compile: used; the compiled step differs by {found:.1e} from the eager one")
    return partial(train_step, gradients=compiled), True


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
