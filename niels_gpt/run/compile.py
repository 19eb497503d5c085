"""The step with its parts compiled by `torch.compile`, and the check that comes before its use.

What is compiled is `block_gradients`, from outside the `torch.func` transform (inside is rejected),
once for the shape of a block, and `update` (the clip and AdamW). The loop over blocks stays eager.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from niels_gpt.loss import Batch, block_gradients, gradients
from niels_gpt.optim import Tree, update
from niels_gpt.state import TrainState
from niels_gpt.step import GradientFunction, StepFunction, UpdateFunction, train_step

TOLERANCE = 1e-3  # of the largest element of each tensor; rounding gives about 1e-5


def compile_step() -> StepFunction:
    """Return `train_step` of compiled parts; compilation happens on the first call."""
    gradients, update = compile_parts()
    return partial(train_step, gradients=gradients, update=update)


def compile_parts() -> tuple[GradientFunction, UpdateFunction]:
    """Return `gradients` and `update`, compiled."""
    of_block = torch.compile(block_gradients, dynamic=False, fullgraph=True)
    of_numbers = torch.compile(update, dynamic=False, fullgraph=True)

    def compiled_update(*trees: Any, count: int, lr: float | Tensor, **fixed: Any) -> Any:
        """Pass what changes at every step as tensors: numbers would be compiled in."""
        return of_numbers(*trees, count=torch.tensor(count), lr=torch.as_tensor(lr), **fixed)

    return partial(gradients, of_block=of_block), compiled_update


def tree_difference(a: Tree, b: Tree) -> Tensor:
    """Return the largest difference, relative to the largest element of each tensor of a, 0-d.

    NaN anywhere gives NaN.
    """
    return torch.stack(
        [(a[name] - b[name]).abs().max() / a[name].abs().max().clamp(min=1e-12) for name in a]
    ).max()


def step_difference(state: TrainState, batch: Batch, parts: tuple[Any, Any]) -> float:
    """Return how far a step of these `gradients` and `update` is from the eager one.

    Of the gradients the first moments are compared, which they enter without the sign-like
    division of AdamW; of the update everything, on equal gradients.
    """
    gradients, update = parts
    lr = state.train_cfg.base_lr  # that of a first step can be 0 and would show nothing
    eager, _ = train_step(state, batch, lr)
    half, _ = train_step(state, batch, lr, gradients=gradients)
    whole, _ = train_step(state, batch, lr, gradients=gradients, update=update)
    pairs = [(eager.mu, half.mu), *zip(half[:3], whole[:3], strict=True)]
    return torch.stack([tree_difference(a, b) for a, b in pairs]).max().item()


def choose_step(
    state: TrainState, batch: Batch, say: Callable[[str], None]
) -> tuple[StepFunction, bool]:
    """Compile the step and compare it with the eager one on a batch; fall back where they differ.

    Returns:
        The step to use, and whether it is the compiled one.
    """
    gradients, update = parts = compile_parts()
    try:
        difference = step_difference(state, batch, parts)
    except Exception as error:  # whatever a compiler may raise
        say(f"compile: failed, going on eagerly: {type(error).__name__}: {_first_line(error)}")
        return train_step, False
    if not difference <= TOLERANCE:
        say(f"compile: the compiled step differs by {difference:.1e} from the eager one: not used")
        return train_step, False
    say(f"compile: used; the compiled step differs by {difference:.1e} from the eager one")
    return partial(train_step, gradients=gradients, update=update), True


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
