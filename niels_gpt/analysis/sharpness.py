"""Sharpness: the largest eigenvalue of the Hessian, and the learning rate it allows.

Shapes: P parameters in all. A direction is a tree like the parameters, or one vector (P,).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp

from niels_gpt.analysis.noise import OnProgress, next_rows
from niels_gpt.config import ModelConfig
from niels_gpt.corpus import Corpus
from niels_gpt.loss import Batch, gradients
from niels_gpt.lr_schedule import lr_of_step
from niels_gpt.optim import adamw
from niels_gpt.optim.trees import Tree, to_tree, to_vector
from niels_gpt.rng import keyed_generator
from niels_gpt.state import TrainState


class Eigenvalue(NamedTuple):
    """An estimate of the largest eigenvalue of a symmetric map."""

    value: float
    error: float  # an eigenvalue lies within this of `value`
    products: int  # with vectors
    converged: bool  # if not, `value` is a lower bound, up to rounding


class Curvature(NamedTuple):
    """The sharpness of a state, plain and as AdamW sees it, and the stable learning rates."""

    plain: Eigenvalue
    plain_lr: float
    adam: Eigenvalue | None  # None if there are no moments
    adam_lr: float | None
    lr: float  # of the schedule, at this step


def curvature(
    state: TrainState,
    corpus: Corpus,
    *,
    iterations: int = 20,
    on_progress: OnProgress = lambda done, total: None,
) -> Curvature:
    """Measure both sharpnesses on the next batch of a run; see `sharpness` and `largest_lr`."""
    batch, _ = next_rows(state, corpus, 1)
    params, cfg = state.params, state.model_cfg
    generator = keyed_generator(state.train_cfg.seed, "sharpness", state.step)
    vector = to_vector(params)
    start = torch.randn(vector.shape, generator=generator).to(vector.device)

    def find(scale: Tree | None) -> Eigenvalue:
        return sharpness(
            params,
            batch,
            cfg,
            start,
            scale=scale,
            iterations=iterations,
            on_progress=on_progress,
        )

    scale = adam_scale(state)
    plain, adam = find(None), None if scale is None else find(scale)
    return Curvature(
        plain=plain,
        plain_lr=largest_lr(plain.value),
        adam=adam,
        adam_lr=None if adam is None else largest_lr(adam.value, adamw.MOMENTUM),
        lr=lr_of_step(min(state.step, state.train_cfg.total_steps - 1), state.train_cfg),
    )


def hessian_product(params: Tree, direction: Tree, batch: Batch, cfg: ModelConfig) -> Tree:
    """Multiply the Hessian of the mean loss, without dropout, by a direction.

    Forward over reverse: the derivative of the gradient along the direction (Pearlmutter 1994).
    """
    product: Tree = jvp(lambda p: gradients(p, batch, cfg)[0], (params,), (direction,))[1]
    return product


def sharpness(
    params: Tree,
    batch: Batch,
    cfg: ModelConfig,
    start: Tensor,
    *,
    scale: Tree | None = None,
    iterations: int = 20,
    on_progress: OnProgress = lambda done, total: None,
) -> Eigenvalue:
    """Find the largest eigenvalue of the Hessian H, or of D H D with D = diag(scale).

    Args:
        start: (P,), a random start vector.
    """
    diagonal = torch.ones_like(start) if scale is None else to_vector(scale)

    def product(v: Tensor) -> Tensor:
        return diagonal * to_vector(
            hessian_product(params, to_tree(diagonal * v, params), batch, cfg)
        )

    return largest_eigenvalue(product, start, iterations=iterations, on_progress=on_progress)


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    iterations: int = 20,
    tolerance: float = 0.01,
    on_progress: OnProgress = lambda done, total: None,
) -> Eigenvalue:
    """Find the largest eigenvalue of a symmetric map by Lanczos, fully orthogonalised.

    Lanczos 1950; the error bound beta |s|, with s the last component of the Ritz vector, is from
    Parlett 1980, section 13-2. Stops when the bound is below `tolerance` of the value.
    """
    basis = [start / start.norm()]
    rows: list[tuple[float, float]] = []  # diagonal and next to it
    for done in range(1, iterations + 1):
        w = product(basis[-1])
        alpha = (w @ basis[-1]).item()
        for q in basis * 2:  # once is not enough in float32
            w = w - (w @ q) * q
        beta = w.norm().item()
        rows.append((alpha, beta))
        values, vectors = torch.linalg.eigh(_tridiagonal(rows))
        value, error = values[-1].item(), beta * abs(vectors[-1, -1].item())
        converged = error <= tolerance * abs(value) or len(basis) == len(start)
        on_progress(iterations if converged else done, iterations)
        if converged:
            break
        basis.append(w / beta)
    return Eigenvalue(value, error, done, converged)


def _tridiagonal(rows: Sequence[tuple[float, float]]) -> Tensor:
    diagonal, beside = zip(*rows, strict=True)
    off = torch.tensor(beside[:-1]).diag(1) if len(rows) > 1 else torch.zeros(1, 1)
    return torch.tensor(diagonal).diag() + off + off.T


def adam_scale(state: TrainState) -> Tree | None:
    """Return the diagonal D for which D H D has the curvature that AdamW sees.

    With the preconditioner P of its last update, D = P^(-1/2). None if there was no update.
    """
    P = adamw.preconditioner(state.opt_state, state.step)
    return None if P is None else {name: x.rsqrt() for name, x in P.items()}


def largest_lr(curvature: float, momentum: float = 0.0) -> float:
    """Return the learning rate above which a quadratic of this curvature diverges.

    For x <- x - lr * m with m <- momentum * m + (1 - momentum) * gradient it is
    2 (1 + momentum) / ((1 - momentum) curvature): 2 / curvature for plain gradient descent, and
    38 / curvature for Adam's beta1 = 0.9 with the preconditioned curvature (Cohen et al. 2022,
    "Adaptive gradient methods at the edge of stability", arXiv 2207.14484, section 3).

    The bound assumes the full gradient and a frozen preconditioner: the noise of small batches
    lowers it, clipping and an adapting preconditioner let a run survive above it. Weight decay is
    ignored. Curvature follows the learning rate: a run drifts to where its rate is near the bound.
    """
    if curvature <= 0:
        return math.inf
    return 2 * (1 + momentum) / ((1 - momentum) * curvature)
