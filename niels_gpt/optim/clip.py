"""Gradient clipping."""

from torch import Tensor

from niels_gpt.optim.trees import Tree, global_norm


def clip_by_global_norm(grads: Tree, max_norm: float | Tensor) -> tuple[Tree, Tensor]:
    """Scale gradients to a global norm of at most `max_norm`; return them and the norm before.

    As `torch.nn.utils.clip_grad_norm_`, the factor is min(1, max_norm / (norm + 1e-6)).
    """
    norm = global_norm(grads)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return {name: g * factor for name, g in grads.items()}, norm
