"""Gradient clipping and AdamW, as pure functions on trees (dicts of named tensors).

Plain tensor operations throughout: fused and foreach kernels cannot be vmapped.
"""

import torch
from torch import Tensor

Tree = dict[str, Tensor]

BETAS = (0.9, 0.95)
EPS = 1e-8


def global_norm(tree: Tree) -> Tensor:
    """Return the Euclidean norm over all elements of all tensors, 0-d."""
    return torch.stack([g.square().sum() for g in tree.values()]).sum().sqrt()


def clip_by_global_norm(grads: Tree, max_norm: float | Tensor) -> tuple[Tree, Tensor]:
    """Scale gradients to a global norm of at most `max_norm`; return them and the norm before.

    As `torch.nn.utils.clip_grad_norm_`, the factor is min(1, max_norm / (norm + 1e-6)).
    """
    norm = global_norm(grads)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return {name: g * factor for name, g in grads.items()}, norm


def update(
    params: Tree,
    grads: Tree,
    mu: Tree,
    nu: Tree,
    *,
    count: int | Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    max_norm: float | Tensor,
) -> tuple[Tree, Tree, Tree, Tensor]:
    """Clip, then apply AdamW: return new params, mu and nu, and the norm before the clip."""
    grads, norm = clip_by_global_norm(grads, max_norm)
    return *adamw(params, grads, mu, nu, count=count, lr=lr, weight_decay=weight_decay), norm


def adamw(
    params: Tree,
    grads: Tree,
    mu: Tree,
    nu: Tree,
    *,
    count: int | Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor,
) -> tuple[Tree, Tree, Tree]:
    """Apply AdamW once (Loshchilov and Hutter 2019, algorithm 2); return new params, mu and nu.

    As `torch.optim.AdamW`: the decay is decoupled and scaled by lr, and acts on every parameter.

    Args:
        count: number of this update, from 1; for the bias corrections 1 - beta**count.
        lr, weight_decay: numbers or 0-d tensors, the latter so that a sweep can map over them.
    """
    beta1, beta2 = BETAS
    step_size = lr / (1 - beta1**count)
    correction2 = (1 - beta2**count) ** 0.5
    new_params, new_mu, new_nu = {}, {}, {}
    for name, p in params.items():
        g = grads[name]
        m = new_mu[name] = mu[name].lerp(g, 1 - beta1)
        v = new_nu[name] = torch.addcmul(nu[name] * beta2, g, g, value=1 - beta2)
        update = m / (v.sqrt() / correction2 + EPS)
        new_params[name] = p * (1 - lr * weight_decay) - step_size * update
    return new_params, new_mu, new_nu


def to_vector(tree: Tree) -> Tensor:
    """Concatenate all tensors of a tree, (P,)."""
    return torch.cat([x.flatten() for x in tree.values()])


def to_tree(vector: Tensor, like: Tree) -> Tree:
    """Cut a vector (P,) into a tree; inverse of `to_vector`."""
    parts = torch.split(vector, [x.numel() for x in like.values()])
    return {name: part.view_as(x) for part, (name, x) in zip(parts, like.items(), strict=True)}
