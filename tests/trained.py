"""Checkpoints of small untrained models, for tests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from niels_gpt.checkpoint import checkpoint_of, write_checkpoint
from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.state import TrainState, make_state

SMALL = ModelConfig(T=64, C=12, L=2, H=2, d_ff=16)


def lively_state(cfg: ModelConfig = SMALL, seed: int = 0) -> TrainState:
    """Return parameters large enough for every visible byte to affect the next."""
    state = make_state(cfg, TrainConfig(seed=seed))
    generator = torch.Generator().manual_seed(seed)
    params = {
        name: p * 20 if p.ndim == 2 else p + 0.3 * torch.randn(p.shape, generator=generator)
        for name, p in state.params.items()
    }
    return state._replace(params=params)


def save_lively(path: Path, cfg: ModelConfig = SMALL, **train: Any) -> Path:
    state = lively_state(cfg)
    state = state._replace(train_cfg=replace(state.train_cfg, **train))
    write_checkpoint([path], checkpoint_of(state))
    return path
