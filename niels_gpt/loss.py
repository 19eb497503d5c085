"""The training loss and its gradient, as functions of the parameters.

Shapes: B rows, T positions, S dropout sites, V byte values.
"""

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad_and_value, jvp

from niels_gpt.config import ModelConfig
from niels_gpt.model.gpt import GPT, skeleton
from niels_gpt.optim.trees import Tree

Batch = tuple[Tensor, Tensor]  # ids and the ids that follow them, each int64 (B, T)
BlockGradients = Callable[[Tree, Batch, Tensor | None, GPT, int], tuple[Tree, Tensor]]

ROW_BLOCK = 2048  # positions differentiated at a time, so that their activations stay in the cache


def forward(params: Tree, x: Tensor, cfg: ModelConfig, drop: Tensor | None = None) -> Tensor:
    """Compute logits (B, T, V) of ids x (B, T); `drop` as in `GPT.forward`, None for no dropout."""
    return logits_of(skeleton(cfg), params, x, drop)


def logits_of(model: GPT, params: Tree, x: Tensor, drop: Tensor | None = None) -> Tensor:
    """Compute logits (B, T, V) with a module, using `params` in place of its own."""
    logits: Tensor = functional_call(model, params, (x,), {"drop": drop}, strict=True)
    return logits


def loss(params: Tree, batch: Batch, cfg: ModelConfig, drop: Tensor | None = None) -> Tensor:
    """Return the mean cross entropy over all B*T positions in nats, 0-d."""
    x, y = batch
    return cross_entropy(forward(params, x, cfg, drop), y)


def cross_entropy(logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross entropy in nats of logits (B, T, V) against ids y (B, T), 0-d."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction=reduction)


def row_losses(params: Tree, batch: Batch, cfg: ModelConfig, drop: Tensor | None = None) -> Tensor:
    """Return the mean cross entropy of each row in nats, (B,)."""
    x, y = batch
    logits = forward(params, x, cfg, drop)
    return F.cross_entropy(logits.transpose(1, 2), y, reduction="none").mean(1)


def row_slopes(
    params: Tree, direction: Tree, batch: Batch, cfg: ModelConfig, drop: Tensor | None = None
) -> Tensor:
    """Return the derivative of each row's loss along a direction, (n,): gradient times direction.

    One forward-mode pass (Jacobian-vector product) computes those of all rows of a block.
    """
    slopes = [
        jvp(lambda p, b=block, k=keys: row_losses(p, b, cfg, k), (params,), (direction,))[1]
        for block, keys in row_blocks(batch, drop)
    ]
    return torch.cat(slopes)


def gradients(
    params: Tree,
    batch: Batch,
    cfg: ModelConfig,
    drop: Tensor | None = None,
    *,
    of_block: BlockGradients | None = None,
) -> tuple[Tree, Tensor]:
    """Return the gradient of the mean loss, and the loss.

    The batch is processed in blocks of `rows_per_block` rows, whose gradients are summed. Up to
    rounding, the result is the gradient of the whole batch in one pass, dropout included.

    Args:
        batch: x and y, each int64 (B, T).
        drop: (B, S, 2) keys from `niels_gpt.model.dropout`, or None.
        of_block: the function for each block: `block_gradients`, a compiled version, or
            `direct_block_gradients`.
    """
    of_block = of_block or block_gradients
    B = len(batch[0])
    model = skeleton(cfg)
    return reduce(_add, (of_block(params, *b, model, B) for b in row_blocks(batch, drop)))


def block_gradients(
    params: Tree, block: Batch, keys: Tensor | None, model: GPT, B: int
) -> tuple[Tree, Tensor]:
    """Return a block's share of the gradient and of the mean loss of a batch of B rows."""

    return grad_and_value(share_of_loss)(params, block, keys, model, B)


def direct_block_gradients(
    params: Tree, block: Batch, keys: Tensor | None, model: GPT, B: int
) -> tuple[Tree, Tensor]:
    """Return the bits of `block_gradients` from torch.autograd, which costs less per operation.

    Not for use inside a transform, nor to be differentiated itself: the result is detached.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    with torch.enable_grad():
        share = share_of_loss(leaves, block, keys, model, B)
    grads = torch.autograd.grad(share, [*leaves.values()])
    return dict(zip(leaves, grads, strict=True)), share.detach()


def share_of_loss(params: Tree, block: Batch, keys: Tensor | None, model: GPT, B: int) -> Tensor:
    """Return a block's share of the mean loss of a batch of B rows, 0-d."""
    x, y = block
    nats = cross_entropy(logits_of(model, params, x, keys), y)
    # a tensor: the tangent of a scalar times a number is float64, which MPS lacks
    return nats * nats.new_full((), len(x) / B)


def row_blocks(batch: Batch, drop: Tensor | None = None) -> list[tuple[Batch, Tensor | None]]:
    """Split a batch and its keys into blocks of `rows_per_block` rows."""
    x, y = batch
    rows = rows_per_block(x.shape[1])
    blocks = [slice(start, start + rows) for start in range(0, len(x), rows)]
    return [((x[i], y[i]), None if drop is None else drop[i]) for i in blocks]


def _add(a: tuple[Tree, Tensor], b: tuple[Tree, Tensor]) -> tuple[Tree, Tensor]:
    """Sum two blocks' gradients and losses, into the buffers of the first."""
    return {name: a[0][name].add_(b[0][name]) for name in a[0]}, a[1] + b[1]


def rows_per_block(T: int) -> int:
    """Return the number of rows of T positions to differentiate at a time."""
    return max(1, ROW_BLOCK // T)
