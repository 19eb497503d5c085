"""The gradient noise scale: the number of rows at which signal and noise are equal.

Shapes: n rows, T positions, S dropout sites.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from niels_gpt.config import ModelConfig
from niels_gpt.corpus import Corpus
from niels_gpt.loss import Batch, gradients, row_slopes
from niels_gpt.optim.trees import Tree, global_norm
from niels_gpt.state import TrainState
from niels_gpt.step import dropout_of_step

Z95 = 1.959964  # a normal variable lies within this many standard deviations with probability 0.95

OnProgress = Callable[[int, int], object]  # called with (done, total)


class NoiseScale(NamedTuple):
    """The gradient noise scale of single rows; see `noise_scale`."""

    rows: int  # measured on so many
    scale: float  # rows; infinite if the gradient is lost in the noise
    low: float  # 95 % interval
    high: float
    signal: float  # |G|^2, unbiased
    variance: float  # tr(Sigma), unbiased


def gradient_noise(
    state: TrainState,
    corpus: Corpus,
    batches: int,
    *,
    on_progress: OnProgress = lambda done, total: None,
) -> NoiseScale:
    """Measure the noise scale on the next batches of a run.

    Raises:
        ValueError: for fewer than 3 rows.
    """
    rows, drop = next_rows(state, corpus, batches)
    products = row_products(state.params, rows, state.model_cfg, drop, on_progress=on_progress)
    return noise_scale(*products)


def next_rows(state: TrainState, corpus: Corpus, n: int) -> tuple[Batch, Tensor | None]:
    """Return the next n batches of a run as one batch, and its dropout keys."""
    model_cfg, cfg = state.model_cfg, state.train_cfg
    steps = range(state.step, state.step + n)
    device = state.device
    batches = (corpus.batch(k, device) for k in steps)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    if not model_cfg.dropout:
        return (x, y), None
    keys = [dropout_of_step(cfg.seed, k, range(cfg.B), model_cfg, device) for k in steps]
    return (x, y), torch.cat([key for key in keys if key is not None])


def row_products(
    params: Tree,
    batch: Batch,
    cfg: ModelConfig,
    drop: Tensor | None = None,
    *,
    on_progress: OnProgress = lambda done, total: None,
) -> tuple[list[float], list[float]]:
    """Return |g_i|^2 and g_i . mean(g) for the gradient g_i of each row.

    The latter takes one forward-mode pass along the mean, so that only one row's gradient is held
    at a time.
    """
    x, y = batch
    n = len(x)
    squares: list[float] = []
    mean = {name: torch.zeros_like(p) for name, p in params.items()}
    for i in range(n):
        row = slice(i, i + 1)
        grads, _ = gradients(params, (x[row], y[row]), cfg, None if drop is None else drop[row])
        squares.append(global_norm(grads).item() ** 2)
        mean = {name: mean[name].add_(grads[name], alpha=1 / n) for name in mean}
        on_progress(i + 1, n)
    return squares, row_slopes(params, mean, batch, cfg, drop).tolist()


def noise_scale(squares: Sequence[float], products: Sequence[float]) -> NoiseScale:
    """Estimate tr(Sigma) / |G|^2, with a 95 % interval, from `row_products`.

    McCandlish et al. 2018 (arXiv 1812.06162), "the simple noise scale": G is the true gradient,
    Sigma the covariance of the gradient of one row. A batch of B rows makes
    1 / (1 + scale/B) of the progress of a step along G itself (their section 2.2), so B = scale
    takes twice the minimum number of steps and of rows (section 2.3). The estimate is unbiased, as
    in their appendix A.1, with batches of 1 and of all n rows::

        tr(Sigma) = sum |g_i - mean|^2 / (n - 1)        |G|^2 = |mean|^2 - tr(Sigma) / n

    The interval is Fieller's for a ratio (1954), with covariances from the jackknife over rows. It
    has no upper end if |G|^2 is not clearly above 0. Derived for SGD; only a guide for AdamW.

    Raises:
        ValueError: for fewer than 3 rows.
    """
    n = len(squares)
    if n < 3:
        raise ValueError(f"the noise scale needs at least 3 rows, not {n}: use more batches")
    total, mean_square = math.fsum(squares), math.fsum(products) / n
    variance, signal = _moments(n, total, mean_square)
    without = [
        _moments(n - 1, total - s, (n * n * mean_square - 2 * n * d + s) / (n - 1) ** 2)
        for s, d in zip(squares, products, strict=True)
    ]
    low, high = _ratio_interval(variance, signal, *_jackknife(without))
    scale = variance / signal if signal > 0 else math.inf
    return NoiseScale(n, scale, low, high, signal, variance)


def _moments(n: int, total: float, mean_square: float) -> tuple[float, float]:
    """Return tr(Sigma) and |G|^2 from n, sum |g_i|^2 and |mean|^2."""
    variance = (total - n * mean_square) / (n - 1)
    return variance, mean_square - variance / n


def _jackknife(without: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Return var(a), var(b), cov(a, b) from the values of (a, b) with each row left out."""
    n = len(without)
    a, b = ([x - math.fsum(xs) / n for x in xs] for xs in zip(*without, strict=True))
    share = (n - 1) / n
    return (
        share * math.fsum(x * x for x in a),
        share * math.fsum(y * y for y in b),
        share * math.fsum(x * y for x, y in zip(a, b, strict=True)),
    )


def _ratio_interval(
    a: float, b: float, var_a: float, var_b: float, cov: float
) -> tuple[float, float]:
    """Return the smallest interval of all r >= 0 with (a - r b)^2 <= Z95^2 var(a - r b)."""
    z = Z95**2
    A, half_B, C = b * b - z * var_b, a * b - z * cov, a * a - z * var_a
    root = half_B * half_B - A * C
    if A <= 0 and root <= 0:
        return 0.0, math.inf
    ends = sorted((half_B + sign * math.sqrt(max(root, 0.0))) / A for sign in (-1, 1))
    if A > 0:
        return max(0.0, ends[0]), ends[1]
    return 0.0 if ends[0] > 0 else max(0.0, ends[1]), math.inf  # all but what is between the ends
