"""Optimizers as values: pure functions on trees, as in optax.

All use plain tensor operations: fused and foreach kernels cannot be vmapped. To add an optimizer,
write a module with the three functions of `adamw` and add a line to `OPTIMIZERS`.
"""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from niels_gpt.config import TrainConfig
from niels_gpt.optim import adamw
from niels_gpt.optim.clip import clip_by_global_norm
from niels_gpt.optim.trees import Tree

OptState = Any  # a NamedTuple of trees that only the optimizer reads; each optimizer has its own


class Optimizer(NamedTuple):
    """An update rule as pure functions, and its equivalent in torch.optim."""

    init: Callable[[Tree], OptState]
    update: Callable[..., tuple[Tree, OptState]]  # signature as `adamw.update`
    torch_optim: Callable[..., torch.optim.Optimizer]  # (name -> parameter, *, lr, weight_decay)


OPTIMIZERS = {"adamw": Optimizer(adamw.init, adamw.update, adamw.torch_optim)}


def optimizer_of(cfg: TrainConfig) -> Optimizer:
    """Return the optimizer of a run."""
    return OPTIMIZERS["adamw"]


def state_fields() -> set[str]:
    """Return the names of all per-parameter tensors in the states of the optimizers."""
    return {field for optimizer in OPTIMIZERS.values() for field in optimizer.init({})._fields}


def clipped_update(
    optimizer: Optimizer,
    params: Tree,
    grads: Tree,
    opt_state: OptState,
    *,
    count: int | Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    max_norm: float | Tensor,
) -> tuple[Tree, OptState, Tensor]:
    """Clip, then update; return the new params and opt_state, and the norm before clipping.

    Args:
        count: number of this update, from 1.
        lr, weight_decay: numbers, or 0-d tensors so that a sweep can map over them.
    """
    grads, norm = clip_by_global_norm(grads, max_norm)
    new_params, new_state = optimizer.update(
        params, grads, opt_state, count=count, lr=lr, weight_decay=weight_decay
    )
    return new_params, new_state, norm


# --- the format of torch.optim: parameter -> {"step": ..., field: tensor} ------------------------


def to_entries(opt_state: OptState, names: Iterable[str], step: int) -> dict[str, dict[str, Any]]:
    """Return the state as torch.optim holds it, by parameter; empty before the first update."""
    if not step:
        return {}
    fields = opt_state._asdict()
    return {
        name: {
            "step": torch.tensor(step, dtype=torch.float32),
            **{field: tree[name] for field, tree in fields.items() if name in tree},
        }
        for name in names
    }


def from_entries(entries: Mapping[str, Mapping[str, Any]], initial: OptState) -> OptState:
    """Return the state held in torch.optim's entries; inverse of `to_entries`.

    Args:
        initial: `init(params)`, which determines the keys of an entry.

    Raises:
        ValueError: if an entry has other keys.
    """
    for name, entry in entries.items():
        expected = {"step", *(f for f, tree in initial._asdict().items() if name in tree)}
        if expected != entry.keys():
            raise ValueError(
                "the optimizer state is from another optimizer: it has "
                f"{reprlib.repr(sorted(entry, key=str))} for {name}, not {sorted(expected)}"
            )
    trees = {
        field: {name: entries[name][field] for name in tree}
        for field, tree in initial._asdict().items()
    }
    return type(initial)(**trees)
