"""The step with its gradients compiled by `torch.compile`, and the check that comes before its use.

What is compiled is `block_gradients`, from outside the `torch.func` transform (inside is rejected),
once for the shape of a block; the loop over blocks, the clip and AdamW stay as they are.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from niels_gpt.loss import Batch, block_gradients, gradients
from niels_gpt.state import TrainState
from niels_gpt.step import train_step

StepFunction = Callable[[TrainState, Batch, float], tuple[TrainState, dict[str, Tensor]]]

TOLERANCE = 1e-3  # of the largest element of each gradient; rounding gives about 1e-5


def compile_step() -> StepFunction:
    """Return `train_step` with compiled gradients; compilation happens on the first call."""
    of_block = torch.compile(block_gradients, dynamic=False, fullgraph=True)
    return partial(train_step, gradients=partial(gradients, of_block=of_block))


def step_difference(a: TrainState, b: TrainState) -> float:
    """Return the largest difference of two steps' first moments, relative to each tensor's largest.

    The first moment moves by the gradient, without the sign-like division of AdamW's update. NaN
    anywhere gives NaN.
    """
    ratios = [
        (a.mu[name] - b.mu[name]).abs().max() / a.mu[name].abs().max().clamp(min=1e-12)
        for name in a.mu
    ]
    return torch.stack(ratios).max().item()


def choose_step(
    state: TrainState, batch: Batch, lr: float, say: Callable[[str], None]
) -> tuple[StepFunction, bool]:
    """Compile the step and compare it with the eager one on a batch; fall back where they differ.

    Returns:
        The step to use, and whether it is the compiled one.
    """
    step = compile_step()
    try:
        difference = step_difference(train_step(state, batch, lr)[0], step(state, batch, lr)[0])
    except Exception as error:  # whatever a compiler may raise
        say(f"compile: failed, going on eagerly: {type(error).__name__}: {_first_line(error)}")
        return train_step, False
    if not difference <= TOLERANCE:
        say(f"compile: the compiled step differs by {difference:.1e} from the eager one: not used")
        return train_step, False
    say(f"compile: used; the compiled step differs by {difference:.1e} from the eager one")
    return step, True


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
