"""What one state tells about its training: gradient noise, curvature, the worth of documents.

Shapes: n rows, T positions, S dropout sites, P parameters in all. A direction is a tree like the
parameters, or all of it as one vector (P,).
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp

from niels_gpt.config import ModelConfig
from niels_gpt.data.roam import list_roam_paths, load_texts, split_roam_paths
from niels_gpt.eval import eval_batches
from niels_gpt.loss import Batch, Tree, gradients, row_blocks, row_losses
from niels_gpt.lr_schedule import lr_of_step
from niels_gpt.optim import BETAS, EPS, global_norm
from niels_gpt.rng import keyed_generator
from niels_gpt.state import TrainState
from niels_gpt.step import batch_of_step, dropout_of_step
from niels_gpt.streams import StreamBuildConfig

Z95 = 1.959964  # a normal variable lies within this many standard deviations with probability 0.95

OnProgress = Callable[[int, int], object]  # told how much is done, and of how much


def row_slopes(
    params: Tree, direction: Tree, batch: Batch, cfg: ModelConfig, drop: Tensor | None = None
) -> Tensor:
    """Return the derivative of each row's loss along a direction, (n,): gradient times direction.

    One forward-mode pass (Jacobian-vector product) gives those of all rows of a block.
    """
    slopes = [
        jvp(lambda p, b=block, k=keys: row_losses(p, b, cfg, k), (params,), (direction,))[1]
        for block, keys in row_blocks(batch, drop)
    ]
    return torch.cat(slopes)


# --- gradient noise ----------------------------------------------------------------------------


class NoiseScale(NamedTuple):
    """The gradient noise scale of single rows; see `noise_scale`."""

    rows: int  # that it was measured on
    scale: float  # rows; infinite where the gradient is lost in the noise
    low: float  # 95 % interval
    high: float
    signal: float  # |G|^2, without bias
    variance: float  # tr(Sigma), without bias


def coming_rows(
    state: TrainState, sources: Mapping[str, bytes], p: Mapping[str, float], batches: int
) -> tuple[Batch, Tensor | None]:
    """Return the rows of the next batches of a run as one batch, and their dropout keys."""
    model_cfg, cfg = state.model_cfg, state.train_cfg
    steps = range(state.step, state.step + batches)
    device = state.params["tok_emb.weight"].device
    xy = [
        batch_of_step(cfg.seed, k, sources, p=p, B=cfg.B, T=model_cfg.T, device=device)
        for k in steps
    ]
    x, y = (torch.cat(parts) for parts in zip(*xy, strict=True))
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
    """Return of each row's gradient g_i its |g_i|^2, and g_i . mean(g).

    The second takes one forward-mode pass along the mean, so that no two gradients of rows are
    held at a time.
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
    1 / (1 + scale/B) of the progress of a step along G itself (their section 2.2), so that B =
    scale takes twice the fewest steps, and twice the fewest rows (section 2.3). Estimated without
    bias as in their appendix A.1, with batches of 1 and of all n rows::

        tr(Sigma) = sum |g_i - mean|^2 / (n - 1)        |G|^2 = |mean|^2 - tr(Sigma) / n

    The interval is that of a ratio (Fieller 1954), with covariances by the jackknife over rows. It
    has no upper end where |G|^2 is not clearly above 0. Derived for SGD; for AdamW a guide only.

    Raises:
        ValueError: for fewer than 3 rows.
    """
    n = len(squares)
    if n < 3:
        raise ValueError(f"the noise scale needs 3 rows or more, not {n}: take more batches")
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
    """Return the r >= 0 with (a - r b)^2 <= Z95^2 var(a - r b)."""
    z = Z95**2
    A, half_B, C = b * b - z * var_b, a * b - z * cov, a * a - z * var_a
    root = half_B * half_B - A * C
    if A <= 0 and root <= 0:
        return 0.0, math.inf
    ends = sorted((half_B + sign * math.sqrt(max(root, 0.0))) / A for sign in (-1, 1))
    return (max(0.0, ends[0]), ends[1]) if A > 0 else (max(0.0, ends[1]), math.inf)


# --- curvature ---------------------------------------------------------------------------------


class Eigenvalue(NamedTuple):
    """The largest eigenvalue of a symmetric map, as far as it was found."""

    value: float
    error: float  # an eigenvalue lies within this of `value`
    products: int  # with vectors
    converged: bool  # if not, `value` is a lower bound of the largest, give or take rounding


class Curvature(NamedTuple):
    """The sharpness of a state, plain and as AdamW sees it, and the rates that they bear."""

    plain: Eigenvalue
    plain_lr: float
    adam: Eigenvalue | None  # None where there are no moments
    adam_lr: float | None
    lr: float  # of the schedule, at this step


def curvature(
    state: TrainState,
    sources: Mapping[str, bytes],
    p: Mapping[str, float],
    *,
    iterations: int = 20,
    on_progress: OnProgress = lambda done, total: None,
) -> Curvature:
    """Measure both sharpnesses on the next batch of a run; see `sharpness` and `largest_lr`."""
    batch, _ = coming_rows(state, sources, p, 1)
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

    has_moments = any(v.any() for v in state.nu.values())
    plain, adam = find(None), find(adam_scale(state)) if has_moments else None
    return Curvature(
        plain=plain,
        plain_lr=largest_lr(plain.value),
        adam=adam,
        adam_lr=None if adam is None else largest_lr(adam.value, BETAS[0]),
        lr=lr_of_step(min(state.step, state.train_cfg.total_steps - 1), state.train_cfg),
    )


def hessian_product(params: Tree, direction: Tree, batch: Batch, cfg: ModelConfig) -> Tree:
    """Multiply the Hessian of the mean loss, without dropout, with a direction.

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
        start: (P,) to begin with; random.
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

    Lanczos 1950; the error bound beta |s| with s the last component of the Ritz vector is that of
    Parlett 1980, section 13-2. Ends when the bound is below `tolerance` of the value.
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


def adam_scale(state: TrainState) -> Tree:
    """Return the diagonal D for which D H D has the curvature that AdamW sees.

    AdamW divides its update by P = sqrt(nu / (1 - beta2^t)) + eps, so D = P^(-1/2).
    """
    correction = 1 - BETAS[1] ** state.step
    return {name: ((v / correction).sqrt() + EPS).rsqrt() for name, v in state.nu.items()}


def largest_lr(curvature: float, momentum: float = 0.0) -> float:
    """Return the learning rate above which a quadratic of this curvature diverges.

    For x <- x - lr * m with m <- momentum * m + (1 - momentum) * gradient it is
    2 (1 + momentum) / ((1 - momentum) curvature): 2 / curvature for plain gradient descent, and
    38 / curvature for Adam's beta1 = 0.9 with the preconditioned curvature (Cohen et al. 2022,
    "Adaptive gradient methods at the edge of stability", arXiv 2207.14484, section 3).

    A bound of the whole gradient and of a frozen preconditioner: noise of small batches lowers it,
    clipping and an adapting preconditioner let a run survive above it, and weight decay is left
    out. Curvature follows the learning rate: a run drifts to where its own rate is near the bound.
    """
    if curvature <= 0:
        return math.inf
    return 2 * (1 + momentum) / ((1 - momentum) * curvature)


def to_vector(tree: Tree) -> Tensor:
    """Concatenate all tensors of a tree, (P,)."""
    return torch.cat([x.flatten() for x in tree.values()])


def to_tree(vector: Tensor, like: Tree) -> Tree:
    """Cut a vector (P,) into a tree; inverse of `to_vector`."""
    parts = torch.split(vector, [x.numel() for x in like.values()])
    return {name: part.view_as(x) for part, (name, x) in zip(parts, like.items(), strict=True)}


# --- documents ---------------------------------------------------------------------------------


class Influence(NamedTuple):
    """What training on a document does to the validation loss, to first order."""

    name: str
    nbytes: int
    value: float  # see `influences`


def validation_gradient(state: TrainState, stream: bytes, batches: int) -> tuple[Tree, float]:
    """Return v, the gradient on the first batches of `evaluate`, and v . g of as many after them.

    The second is |G|^2 of the whole stream without bias. |v|^2 is not: it has the noise of v in it,
    tr(Sigma) / rows, which late in a run is most of it. Without dropout.
    """
    cfg, model_cfg = state.train_cfg, state.model_cfg
    drawn = eval_batches(
        stream,
        B=cfg.B,
        T=model_cfg.T,
        device=state.params["tok_emb.weight"].device,
        eval_steps=2 * batches,
        seed=cfg.seed,
    )
    x, y = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    n = batches * cfg.B
    v, _ = gradients(state.params, (x[:n], y[:n]), model_cfg)
    return v, row_slopes(state.params, v, (x[n:], y[n:]), model_cfg).mean().item()


def influences(
    params: Tree,
    direction: Tree,
    documents: Sequence[tuple[str, bytes]],
    cfg: ModelConfig,
    *,
    unit: float,
    windows: int = 2,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Influence]:
    """Return how much a step on each document helps along `direction`, the validation gradient v.

    A gradient step of size lr on document d changes the validation loss by -lr v . g_d + O(lr^2),
    where g_d is the gradient of the mean loss over its bytes (Pruthi et al. 2020, TracIn, arXiv
    2002.08484, at one checkpoint). The value is v . g_d / unit; with the v . g of other validation
    text as the unit, 1 helps as much as a step on that, 0 not at all, below 0 it hurts. All
    v . g_d come from one forward-mode pass along v; no document is differentiated backwards.

    Args:
        documents: names and UTF-8; each of 2 bytes or more.
        unit: the v . g that counts as 1; see `validation_gradient`.
        windows: how many stretches of at most T + 1 bytes to take of each, evenly spread.
    """
    device = params["tok_emb.weight"].device
    pieces = [
        (i, piece) for i, (_, text) in enumerate(documents) for piece in cut(text, cfg.T, windows)
    ]
    sums, counts = [0.0] * len(documents), [0] * len(documents)
    for start in range(0, len(pieces), BLOCK):
        block = pieces[start : start + BLOCK]
        x, y = (ids.to(device) for ids in pad([piece for _, piece in block], cfg.T))
        slopes = row_slopes(params, direction, (x, y), cfg).tolist()
        for (i, piece), slope in zip(block, slopes, strict=True):
            sums[i] += slope * cfg.T  # a slope is of the sum over the piece, divided by T
            counts[i] += len(piece) - 1
        on_progress(start + len(block), len(pieces))
    return [
        Influence(name, len(text), total / count / unit)
        for (name, text), total, count in zip(documents, sums, counts, strict=True)
    ]


def notes_worth(
    state: TrainState,
    val_stream: bytes,
    notes: Sequence[tuple[str, bytes]],
    *,
    batches: int = 4,
    windows: int = 2,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Influence]:
    """Return the influence of each note on the loss on the validation stream.

    Raises:
        ValueError: if so few batches do not show which way the loss falls.
    """
    direction, unit = validation_gradient(state, val_stream, batches)
    if not unit > 0:
        raise ValueError(
            f"the gradient of {batches} validation batches is lost in their noise: take more"
        )
    return influences(
        state.params,
        direction,
        notes,
        state.model_cfg,
        unit=unit,
        windows=windows,
        on_progress=on_progress,
    )


def training_notes(
    cfg: StreamBuildConfig, seed: int, *, min_bytes: int = 64
) -> list[tuple[str, bytes]]:
    """Return the notes that a run of this seed trains on, named by their path below the folder.

    Raises:
        ValueError: if there are none of `min_bytes` or more.
    """
    root = os.path.abspath(cfg.roam_root)
    paths, _ = split_roam_paths(
        list_roam_paths(root), val_frac=cfg.roam_val_frac, seed=seed, root=root
    )
    texts = [text.encode(errors="replace") for text in load_texts(paths)]
    found = [
        (os.path.relpath(path, root), text)
        for path, text in zip(paths, texts, strict=True)
        if len(text) >= max(2, min_bytes)
    ]
    if not found:
        raise ValueError(f"{root}: no notes (*.md) of {min_bytes} bytes or more")
    return found


BLOCK = 32  # pieces of documents that are padded to one tensor at a time


def cut(text: bytes, T: int, windows: int) -> list[bytes]:
    """Cut at most `windows` stretches of T + 1 bytes out of a text, evenly spread."""
    last = len(text) - (T + 1)
    if last <= 0:
        return [text]
    n = min(windows, math.ceil(len(text) / (T + 1)))
    starts = [last // 2] if n == 1 else [last * i // (n - 1) for i in range(n)]
    return [text[start : start + T + 1] for start in starts]


def pad(pieces: Sequence[bytes], T: int) -> Batch:
    """Make x and y, each (n, T), of pieces of 2 to T + 1 bytes.

    What lies behind a piece has the target -100, which `cross_entropy` leaves out.
    """
    x = torch.zeros(len(pieces), T, dtype=torch.int64)
    y = torch.full((len(pieces), T), -100)
    for i, piece in enumerate(pieces):
        ids = torch.tensor(list(piece))
        x[i, : len(piece) - 1], y[i, : len(piece) - 1] = ids[:-1], ids[1:]
    return x, y
