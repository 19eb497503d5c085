"""Optimizers as values: pure functions on trees, as in optax.

All use plain tensor operations: fused and foreach kernels cannot be vmapped. To add an optimizer,
write a module with `init`, `update`, `torch_optim` and `group` as in `adamw`, and name it in
`config.OPTIMIZERS`.
"""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from niels_gpt.config import OPTIMIZERS as NAMES
from niels_gpt.config import TrainConfig
from niels_gpt.optim.clip import clip_by_global_norm
from niels_gpt.optim.trees import Tree

OptState = Any  # a NamedTuple of trees that only the optimizer reads; each optimizer has its own


def _no_torch_optim(*_: object, **__: object) -> Any:
    raise TypeError("this optimizer has no equivalent in torch.optim")


class Optimizer(NamedTuple):
    """An update rule as pure functions, and its equivalent in torch.optim.

    `update`, `torch_optim` and `group` have the signatures of those in `adamw`; without the last
    two, a state cannot become modules or a file.
    """

    init: Callable[[Tree], OptState]
    update: Callable[..., tuple[Tree, OptState]]
    torch_optim: Callable[..., torch.optim.Optimizer] = _no_torch_optim
    group: Callable[..., dict[str, Any]] = _no_torch_optim


def _optimizer_in(module: Any) -> Optimizer:
    return Optimizer(module.init, module.update, module.torch_optim, module.group)


OPTIMIZERS = {name: _optimizer_in(import_module(f"{__name__}.{name}")) for name in NAMES}


def optimizer_of(cfg: TrainConfig) -> Optimizer:
    """Return the optimizer of a run."""
    return OPTIMIZERS[cfg.optimizer]


def state_fields() -> set[str]:
    """Return the names of all per-parameter tensors in the states of the optimizers."""
    return {field for optimizer in OPTIMIZERS.values() for field in optimizer.init({})._fields}


def update(
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


def to_state_dict(
    optimizer: Optimizer,
    opt_state: OptState,
    names: Iterable[str],
    step: int,
    *,
    lr: float,
    weight_decay: float,
) -> dict[str, Any]:
    """Return the state_dict that its `torch_optim` over these parameters would have.

    To make one imports torch's compiler, which takes seconds and needs a writable temporary folder.
    """
    numbers = {name: i for i, name in enumerate(names)}
    entries = to_entries(opt_state, numbers, step)
    group = optimizer.group([*numbers], lr=lr, weight_decay=weight_decay)
    return {
        "state": {numbers[name]: entry for name, entry in entries.items()},
        "param_groups": [{**group, "params": [*numbers.values()]}],
    }


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
        ValueError: if an entry has other keys; it names both optimizers if both are known.
    """
    if misfit := _misfit(entries, initial):
        params = {name: zero for tree in initial for name, zero in tree.items()}
        fresh = {name: optimizer.init(params) for name, optimizer in OPTIMIZERS.items()}
        for name, other in fresh.items():
            if not _misfit(entries, other):
                wanted = next(n for n, own in fresh.items() if type(own) is type(initial))
                raise ValueError(
                    f"the optimizer state is that of {name}, but train.optimizer is {wanted}: "
                    f"set it to {name} to continue, or start a new run from the weights (--from)"
                )
        raise ValueError(f"the optimizer state is from another optimizer: it has {misfit}")
    trees = {
        field: {name: entries[name][field] for name in tree}
        for field, tree in initial._asdict().items()
    }
    return type(initial)(**trees)


def _misfit(entries: Mapping[str, Mapping[str, Any]], initial: OptState) -> str | None:
    """Describe the first entry whose keys are not those of a state such as `initial`."""
    for name, entry in entries.items():
        expected = {"step", *(f for f, tree in initial._asdict().items() if name in tree)}
        if expected != entry.keys():
            found = reprlib.repr(sorted(entry, key=str))
            return f"{found} for {name}, not {sorted(expected)}"
    return None
