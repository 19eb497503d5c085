"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from niels_gpt.config import TrainConfig

DECAYS: dict[
    str, Callable[[float], float]
] = {  # progress in [0, 1] -> the share of the way from `min_lr` to `base_lr`
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
}


def lr_at_step(
    step: int,
    total_steps: int,
    *,
    base_lr: float,
    warmup_steps: int,
    min_lr: float,
    decay: str = "cosine",
) -> float:
    """Return the learning rate of the update after `step` finished updates.

    Linear warmup from 0 to `base_lr` at step `warmup_steps` (below `min_lr` at first), then one of
    `DECAYS` down to exactly `min_lr` at step `total_steps - 1`, clamped to [min_lr, base_lr]: half
    a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983) or a straight line (Defazio et al. 2023,
    arXiv 2310.07831). If `warmup_steps >= total_steps - 1` leaves no room to decay, the schedule
    ends at the peak.

    Raises:
        ValueError: for an invalid argument; `step` must be in [0, total_steps - 1].
    """
    if decay not in DECAYS:
        raise ValueError(f"decay={decay!r} must be one of {', '.join(DECAYS)}")
    _check(step, total_steps, base_lr, warmup_steps, min_lr)
    if step < warmup_steps:
        return float(base_lr * (step / warmup_steps))
    if step == warmup_steps:
        return float(base_lr)
    progress = (step - warmup_steps) / (total_steps - 1 - warmup_steps)
    rate = min_lr + (base_lr - min_lr) * DECAYS[decay](progress)
    return float(min(max(rate, min_lr), base_lr))


def lr_of_step(step: int, cfg: TrainConfig) -> float:
    """Return the learning rate of a run's update after `step` finished updates."""
    return lr_at_step(
        step,
        cfg.total_steps,
        base_lr=cfg.base_lr,
        warmup_steps=cfg.warmup_steps,
        min_lr=cfg.min_lr,
        decay=cfg.lr_decay,
    )


def _check(step: int, total_steps: int, base_lr: float, warmup_steps: int, min_lr: float) -> None:
    counts = {"step": step, "total_steps": total_steps, "warmup_steps": warmup_steps}
    rates = {"base_lr": base_lr, "min_lr": min_lr}
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool):
            raise ValueError(f"{name}={count!r} must be an integer")
    for name, rate in rates.items():
        number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if not number or not 0 <= rate <= sys.float_info.max:
            raise ValueError(f"{name}={rate!r} must be a finite number, 0 or more")
    if total_steps < 1:
        raise ValueError(f"total_steps={total_steps} must be at least 1")
    if not 0 <= step < total_steps:
        raise ValueError(f"step={step} must be in [0, total_steps - 1] = [0, {total_steps - 1}]")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps} must be at least 0")
    if min_lr > base_lr:
        raise ValueError(f"min_lr={min_lr} is above base_lr={base_lr}")
