"""Muon for the matrices inside the blocks, AdamW for the rest.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) moves a matrix along its momentum with
all singular values set to one. One learning rate serves both parts: the orthogonal matrix is scaled
by 0.2 sqrt(max(rows, columns)), which gives it the root mean square of a typical AdamW update (Liu
et al. 2025, arXiv 2502.16982, equation 4).

Shapes: K matrices of n rows and m columns, n <= m.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from niels_gpt.optim import adamw
from niels_gpt.optim.trees import Tree, zeros_like

MOMENTUM = 0.9  # the papers have 0.95; better by 0.03 nats in runs of minutes (docs/lab-log.md)
RMS = 0.2  # of an update, in units of the learning rate

# Odd quintics a x + b x^3 + c x^5, each the best approximation of 1 on what those before it make of
# [0.01, 1] (Amsel et al. 2025, arXiv 2505.16932, algorithm 1, by Remez). All but the last divide
# their argument by 1.01, against rounding. Together they map [0.01, 1] into 1 +- 0.02.
QUINTICS = (
    (8.01323615, -22.92575697, 16.59941477),
    (3.60057976, -2.64187528, 0.51050538),
    (2.63495048, -1.91900670, 0.43064898),
    (1.95617164, -1.33750775, 0.38385270),
)


class MuonState(NamedTuple):
    """Moving averages, named as torch names them; together the trees hold each parameter once."""

    momentum_buffer: Tree  # of the gradients of the block matrices
    exp_avg: Tree  # of the other gradients
    exp_avg_sq: Tree  # of their squares


def init(params: Tree) -> MuonState:
    """Return the state before the first update: zeros."""
    matrices = {name: p for name, p in params.items() if is_block_matrix(name, p)}
    rest = {name: p for name, p in params.items() if name not in matrices}
    return MuonState(zeros_like(matrices), zeros_like(rest), zeros_like(rest))


def is_block_matrix(name: str, p: Tensor) -> bool:
    """Return whether a parameter is updated by Muon."""
    return name.startswith("blocks.") and p.ndim == 2


def update(
    params: Tree,
    grads: Tree,
    opt_state: MuonState,
    *,
    count: int | Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor,
) -> tuple[Tree, MuonState]:
    """Return the parameters and the optimizer's state after update number `count` (from 1).

    The momentum is a moving average, used one gradient ahead (Nesterov). As in `adamw`, the decay
    is decoupled, scaled by lr, and acts on every parameter.
    """
    average = {n: m.lerp(grads[n], 1 - MOMENTUM) for n, m in opt_state.momentum_buffer.items()}
    ahead = {n: grads[n].lerp(m, MOMENTUM) for n, m in average.items()}
    rest = {n: params[n] for n in opt_state.exp_avg}
    moments = adamw.AdamWState(opt_state.exp_avg, opt_state.exp_avg_sq)
    new, moments = adamw.update(rest, grads, moments, count=count, lr=lr, weight_decay=weight_decay)
    for name, direction in orthogonal(ahead).items():
        new[name] = params[name] * (1 - lr * weight_decay) - lr * direction
    return {name: new[name] for name in params}, MuonState(average, *moments)


def orthogonal(tree: Tree) -> Tree:
    """Return U V^T of each block matrix U S V^T, times RMS sqrt(max(rows, columns)).

    The rows of `attn.qkv` are three matrices, q, k and v. Matrices of one shape, transposed where
    they are tall, are iterated together.
    """
    parts = {name: x.reshape(3 if "qkv" in name else 1, -1, x.shape[1]) for name, x in tree.items()}
    wide = {name: x if x.shape[1] <= x.shape[2] else x.mT for name, x in parts.items()}
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, x in wide.items():
        groups.setdefault(tuple(x.shape[1:]), []).append(name)
    done = {}
    for (_, m), names in groups.items():
        factors = polar_factor(torch.cat([wide[name] for name in names])) * (RMS * math.sqrt(m))
        split = torch.split(factors, [len(wide[name]) for name in names])
        for name, x in zip(names, split, strict=True):
            done[name] = (x if x.shape == parts[name].shape else x.mT).reshape(tree[name].shape)
    return done


def polar_factor(x: Tensor) -> Tensor:
    """Return U V^T, to about 2 %, of each U S V^T in x (K, n, m), n <= m; zero for zero.

    A singular value below 1/100 of the largest gives less than 1, in proportion.

    The iteration needs A = X X^T and A^2, so a bound on the largest singular value, the eighth root
    of the sum of their eighth powers, |A^2|^(1/4), costs nothing. It is much closer than |X|, which
    saves an iteration. If x is wide, the iteration runs on n x n matrices alone: it accumulates the
    factor Q, a polynomial in A, and multiplies x by it at the end.
    """
    n, m = x.shape[1:]
    smallest = torch.finfo(x.dtype).tiny  # below it, a Mac's GPU takes a number for 0
    x = x / x.abs().amax((1, 2), keepdim=True).clamp(min=smallest)  # so that nothing overflows
    A = torch.bmm(x, x.mT)
    A2 = torch.bmm(A, A)
    shrink = A2.square().sum((1, 2), keepdim=True).clamp(min=1) ** -0.25
    (a, b, c), *others = QUINTICS
    x, A = x * shrink.sqrt(), A * shrink
    B = b * A + (c * shrink.square()) * A2  # X becomes (a + B) X
    if m < 2 * n:
        x = torch.baddbmm(x, B, x, beta=a)
        for a, b, c in others:
            A = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
        return x
    Q = B + a * torch.eye(n, dtype=x.dtype, device=x.device)
    for next_a, b, c in others:
        for _ in "XX":  # A becomes (a + B) A (a + B)
            A = torch.baddbmm(A, B, A, beta=a)
        a, B = next_a, torch.baddbmm(A, A, A, beta=b, alpha=c)
        Q = torch.baddbmm(Q, B, Q, beta=a)
    return torch.bmm(Q, x)


class Muon(torch.optim.Optimizer):
    """The same arithmetic in place. A parameter without a gradient counts as one of zeros."""

    def __init__(self, params: Mapping[str, Tensor], *, lr: float, weight_decay: float) -> None:
        super().__init__(params.items(), {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters; return the loss of the closure, if there is one."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            params = dict(zip(group["param_names"], group["params"], strict=True))
            grads = {
                n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in params.items()
            }
            entries = {n: self.state[p] for n, p in params.items()}
            count = 1 + max(int(entry.get("step", 0)) for entry in entries.values())
            numbers = {"count": count, "lr": group["lr"], "weight_decay": group["weight_decay"]}
            new, opt_state = update(params, grads, _state_in(entries, init(params)), **numbers)
            for name, p in params.items():
                p.copy_(new[name])
                entries[name]["step"] = torch.tensor(float(count))
            for field, tree in opt_state._asdict().items():
                for name, x in tree.items():
                    entries[name][field] = x
        return loss


def _state_in(entries: Mapping[str, Mapping[str, Tensor]], initial: MuonState) -> MuonState:
    """Return what the optimizer keeps for each parameter, zeros for a new one."""
    trees = (
        {name: entries[name].get(field, zero) for name, zero in tree.items()}
        for field, tree in initial._asdict().items()
    )
    return MuonState(*trees)


torch_optim = Muon


def group(names: Sequence[str], *, lr: float, weight_decay: float) -> dict[str, Any]:
    """Return the options of the parameter group in a state_dict of `torch_optim`."""
    return {"lr": lr, "weight_decay": weight_decay, "param_names": [*names]}
