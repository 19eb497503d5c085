"""Trees: dicts of named tensors, and NamedTuples of such dicts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tree = dict[str, Tensor]


def global_norm(tree: Tree) -> Tensor:
    """Return the Euclidean norm over all elements of all tensors, 0-d."""
    return torch.stack([g.square().sum() for g in tree.values()]).sum().sqrt()


def zeros_like(tree: Tree) -> Tree:
    """Return a tree of zeros with the same names and shapes."""
    return {name: torch.zeros_like(x) for name, x in tree.items()}


def to_vector(tree: Tree) -> Tensor:
    """Concatenate all tensors of a tree, (P,)."""
    return torch.cat([x.flatten() for x in tree.values()])


def to_tree(vector: Tensor, like: Tree) -> Tree:
    """Split a vector (P,) into a tree; inverse of `to_vector`."""
    parts = torch.split(vector, [x.numel() for x in like.values()])
    return {name: part.view_as(x) for part, (name, x) in zip(parts, like.items(), strict=True)}


def bits(x: Tensor) -> Tensor:
    """View float32 as int32, whose equality tells 0.0 from -0.0 and NaNs apart."""
    return x.contiguous().view(torch.int32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two float32 tensors of one shape have the same bits."""
    return torch.equal(bits(a), bits(b))


def tree_difference(a: Tree, b: Tree) -> Tensor:
    """Return the largest difference, relative to the largest element of each tensor of a, 0-d.

    NaN anywhere gives NaN.
    """
    return torch.stack(
        [(a[name] - b[name]).abs().max() / a[name].abs().max().clamp(min=1e-12) for name in a]
    ).max()


def map_tensors(function: Callable[..., Tensor], first: Any, *others: Any) -> Any:
    """Map a function over the tensors of one or more trees, or of tuples or lists of trees.

    Leaves that are not tensors (a step, a config) come from the first, so a `TrainState` works too.
    """
    if isinstance(first, Tensor):
        return function(first, *others)
    if isinstance(first, dict):
        return {n: map_tensors(function, x, *(o[n] for o in others)) for n, x in first.items()}
    if isinstance(first, list | tuple):
        mapped = (map_tensors(function, *parts) for parts in zip(first, *others, strict=True))
        return getattr(first, "_make", type(first))(mapped)
    return first
