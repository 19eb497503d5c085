"""The sides of a comparison: callables that each advance their own run by one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from benchmarks.imperative import ImperativeGPT, imperative_step, make_optimizer
from niels_gpt import make_state
from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.loss import Batch
from niels_gpt.run.compile import compile_step
from niels_gpt.step import loop_step

Side = Callable[[], object]

SIDES = ("imperative", "niels_gpt")


def make_side(
    name: str, model_cfg: ModelConfig, train_cfg: TrainConfig, *, compiled: bool = False
) -> Side:
    """Return one of `SIDES`, ready to step."""
    make = {"imperative": imperative_side, "niels_gpt": our_side}[name]
    return make(model_cfg, train_cfg, compiled=compiled)


def imperative_side(
    model_cfg: ModelConfig, train_cfg: TrainConfig, *, compiled: bool = False
) -> Side:
    model: nn.Module = ImperativeGPT(model_cfg)
    optimizer = make_optimizer(model, train_cfg)
    if compiled:
        model = cast(nn.Module, torch.compile(model))
    x, y = random_batch(model_cfg, train_cfg)

    def step() -> None:
        imperative_step(model, optimizer, x, y, lr=train_cfg.base_lr, grad_clip=train_cfg.grad_clip)

    return step


def our_side(model_cfg: ModelConfig, train_cfg: TrainConfig, *, compiled: bool = False) -> Side:
    state = make_state(model_cfg, train_cfg)
    batch = random_batch(model_cfg, train_cfg)
    update = compile_step() if compiled else loop_step

    def step() -> None:
        nonlocal state
        state, _ = update(state, batch, train_cfg.base_lr)

    return step


def random_batch(model_cfg: ModelConfig, train_cfg: TrainConfig) -> Batch:
    """Draw x and y (B, T) of random bytes: a step costs the same on any text."""
    x, y = torch.randint(model_cfg.V, (2, train_cfg.B, model_cfg.T))
    return x, y
