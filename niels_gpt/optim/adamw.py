"""AdamW (Loshchilov and Hutter 2019, algorithm 2), as `torch.optim.AdamW` computes it.

The decay is decoupled, scaled by lr, and acts on every parameter.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from niels_gpt.optim.trees import Tree, to_vector, zeros_like

BETAS = (0.9, 0.95)
MOMENTUM = BETAS[0]
EPS = 1e-8


class AdamWState(NamedTuple):
    """Moving averages, named as torch names them; trees like the parameters."""

    exp_avg: Tree  # of the gradients
    exp_avg_sq: Tree  # of their squares


def init(params: Tree) -> AdamWState:
    """Return the state before the first update: zeros."""
    return AdamWState(zeros_like(params), zeros_like(params))


def update(
    params: Tree,
    grads: Tree,
    opt_state: AdamWState,
    *,
    count: int | Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor,
) -> tuple[Tree, AdamWState]:
    """Return the parameters and the optimizer's state after update number `count` (from 1)."""
    beta1, beta2 = BETAS
    step_size = lr / (1 - beta1**count)
    correction2 = (1 - beta2**count) ** 0.5
    new_params, mean, mean_sq = {}, {}, {}
    for name, p in params.items():
        g = grads[name]
        m = mean[name] = opt_state.exp_avg[name].lerp(g, 1 - beta1)
        v = mean_sq[name] = torch.addcmul(opt_state.exp_avg_sq[name] * beta2, g, g, value=1 - beta2)
        change = m / (v.sqrt() / correction2 + EPS)
        new_params[name] = p * (1 - lr * weight_decay) - step_size * change
    return new_params, AdamWState(mean, mean_sq)


def torch_optim(
    params: Mapping[str, Tensor], *, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return the equivalent torch.optim optimizer, which updates in place."""
    return torch.optim.AdamW(
        params.values(), lr=lr, betas=BETAS, eps=EPS, weight_decay=weight_decay
    )


def group(names: Sequence[str], *, lr: float, weight_decay: float) -> dict[str, Any]:
    """Return the options of the parameter group in a state_dict of `torch_optim`."""
    anything = [torch.empty(0)]
    return _Options(anything, lr=lr, betas=BETAS, eps=EPS, weight_decay=weight_decay).defaults


class _Options(torch.optim.AdamW):
    """An AdamW without parameters: adding them is what imports torch's compiler."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        pass


def preconditioner(opt_state: object, count: int) -> Tree | None:
    """Return the divisor of update `count`: P = sqrt(exp_avg_sq / (1 - beta2^count)) + eps.

    None if AdamW has seen no gradient, or for another optimizer's state.
    """
    if not isinstance(opt_state, AdamWState) or not to_vector(opt_state.exp_avg_sq).any():
        return None
    correction = 1 - BETAS[1] ** count
    return {name: (v / correction).sqrt() + EPS for name, v in opt_state.exp_avg_sq.items()}
