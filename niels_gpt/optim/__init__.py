"""Optimizers as values: pure functions on trees, as in optax.

Plain tensor operations throughout: fused and foreach kernels cannot be vmapped. To add one, write
its module (`adamw` shows the three functions) and its line in `OPTIMIZERS`.
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

OptState = Any  # a NamedTuple of trees, which the optimizer alone reads; each optimizer has its own


class Optimizer(NamedTuple):
    """How parameters follow their gradients, and the same as torch.optim does it."""

    init: Callable[[Tree], OptState]
    update: Callable[..., tuple[Tree, OptState]]  # signature as `adamw.update`
    twin: Callable[..., torch.optim.Optimizer]  # (name -> parameter, *, lr, weight_decay)


OPTIMIZERS = {"adamw": Optimizer(adamw.init, adamw.update, adamw.twin)}


def optimizer_of(cfg: TrainConfig) -> Optimizer:
    """Return the optimizer of a run."""
    return OPTIMIZERS["adamw"]


def state_fields() -> set[str]:
    """Return the names under which optimizers keep a tensor of the shape of its parameter."""
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
    """Clip, then update: return new params and opt_state, and the norm before the clip.

    Args:
        count: number of this update, from 1.
        lr, weight_decay: numbers or 0-d tensors, the latter so that a sweep can map over them.
    """
    grads, norm = clip_by_global_norm(grads, max_norm)
    new_params, new_state = optimizer.update(
        params, grads, opt_state, count=count, lr=lr, weight_decay=weight_decay
    )
    return new_params, new_state, norm


# --- the same, as torch.optim keeps it: parameter -> {"step": ..., field: tensor} -----------------


def to_entries(opt_state: OptState, names: Iterable[str], step: int) -> dict[str, dict[str, Any]]:
    """Return name -> what a torch.optim optimizer holds of it; nothing before the first update."""
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
    """Return the state that entries hold; inverse of `to_entries`.

    Args:
        initial: `init(params)`, which says what belongs in an entry.

    Raises:
        ValueError: if an entry has other keys.
    """
    for name, entry in entries.items():
        expected = {"step", *(f for f, tree in initial._asdict().items() if name in tree)}
        if expected != entry.keys():
            raise ValueError(
                "the optimizer state is another optimizer's: it holds "
                f"{reprlib.repr(sorted(entry, key=str))} for {name}, not {sorted(expected)}"
            )
    trees = {
        field: {name: entries[name][field] for name in tree}
        for field, tree in initial._asdict().items()
    }
    return type(initial)(**trees)
