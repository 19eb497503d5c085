"""The training step: a pure function from one state to the next.

Every random draw of step k is a function of (seed, k), so step k is the same in every run. The
parts (`gradients`, `optim.update`, `batch_of_step`, `dropout_of_step`) are public and take
whatever may vary as arguments; compose them differently for other procedures.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from niels_gpt import optim
from niels_gpt.batching import get_batch
from niels_gpt.config import ModelConfig
from niels_gpt.loss import Batch, direct_block_gradients, gradients
from niels_gpt.model.dropout import dropout_keys, sites
from niels_gpt.optim import OptState, optimizer_of
from niels_gpt.optim.trees import Tree
from niels_gpt.rng import keyed_generator
from niels_gpt.state import TrainState

GradientFunction = Callable[
    [Tree, Batch, ModelConfig, Tensor | None], tuple[Tree, Tensor]
]  # as `loss.gradients`
UpdateFunction = Callable[..., tuple[Tree, OptState, Tensor]]  # as `optim.update`
StepFunction = Callable[[TrainState, Batch, float], tuple[TrainState, dict[str, Tensor]]]


def train_step(
    state: TrainState,
    batch: Batch,
    lr: float | Tensor,
    *,
    gradients: GradientFunction = gradients,
    update: UpdateFunction = optim.update,
) -> tuple[TrainState, dict[str, Tensor]]:
    """Update once on a batch; return the next state and metrics. The arguments are unchanged.

    Args:
        state: after `state.step` updates.
        batch: x and y, each int64 (B, T); any B, and T up to the config's.
        lr: learning rate of this update, a number or a 0-d tensor.
        gradients, update: replacements for `loss.gradients` and `optim.update`, such as
            compiled ones.

    Returns:
        The new state, and 0-d tensors on its device: "loss", the mean cross entropy of this batch
        in nats before the update, and "grad_norm", the global norm before clipping.

    To map it over stacked states, leave out what is not a tensor (examples/two_seeds.py): with
    `dims = TrainState(0, 0, None, None, None)`, `vmap(train_step, in_dims=(dims, None, None),
    out_dims=(dims, 0))`. The states then share a step, configs and so the keys of dropout.
    """
    params, opt_state, step, model_cfg, cfg = state
    drop = dropout_of_step(cfg.seed, step, range(len(batch[0])), model_cfg, batch[0].device)
    grads, loss = gradients(params, batch, model_cfg, drop)
    params, opt_state, grad_norm = update(
        optimizer_of(cfg),
        params,
        grads,
        opt_state,
        count=step + 1,
        lr=lr,
        weight_decay=cfg.weight_decay,
        max_norm=cfg.grad_clip,
    )
    new_state = TrainState(params, opt_state, step + 1, model_cfg, cfg)
    return new_state, {"loss": loss, "grad_norm": grad_norm}


def loop_step(
    state: TrainState, batch: Batch, lr: float | Tensor
) -> tuple[TrainState, dict[str, Tensor]]:
    """Return what `train_step` returns, bit for bit, in less time if the model is small.

    For a loop that only trains: it goes around `torch.func`, so no transform can be applied to it.
    """
    return train_step(state, batch, lr, gradients=_direct_gradients)


_direct_gradients = partial(gradients, of_block=direct_block_gradients)


def batch_of_step(
    seed: int,
    step: int,
    sources: Mapping[str, bytes],
    *,
    p: Mapping[str, float],
    B: int,
    T: int,
    device: torch.device | str = "cpu",
) -> Batch:
    """Draw the batch of update `step` (from 0): the same in every run with this seed and text."""
    generator = keyed_generator(seed, "batch", step)
    return get_batch(sources, p=p, B=B, T=T, device=device, generator=generator)


def dropout_of_step(
    seed: int,
    step: int,
    rows: range | Tensor,
    cfg: ModelConfig,
    device: torch.device | str = "cpu",
) -> Tensor | None:
    """Return the dropout keys of update `step` for these rows of its batch.

    Shape (len(rows), S, 2), int32; None for a model without dropout.
    """
    if not cfg.dropout:
        return None
    return dropout_keys(seed, step, rows, sites(cfg.L)).to(device)
