"""Train two seeds at once: states stacked, and one `train_step` mapped over them.

Example: python examples/two_seeds.py text.txt
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from niels_gpt import ModelConfig, TrainConfig, TrainState, batch_of_step, make_state, train_step


def main(text: Path, steps: int = 20) -> list[float]:
    """Return the last training loss of each seed, in nats."""
    sources = {"text": text.read_bytes()}
    model_cfg = ModelConfig(T=64, C=64, L=2, H=2, d_ff=256, dropout=0.0)
    cfg = TrainConfig(B=8, weight_decay=0.0)

    each = [make_state(model_cfg, replace(cfg, seed=seed)) for seed in (0, 1)]
    state = tree_map(lambda *x: torch.stack(x) if isinstance(x[0], Tensor) else x[0], *each)

    in_all = TrainState(0, 0, None, None, None)  # the tensors are mapped, step and configs are not
    step = torch.vmap(train_step, in_dims=(in_all, None, None), out_dims=(in_all, 0))
    for k in range(steps):
        batch = batch_of_step(cfg.seed, k, sources, p={"text": 1.0}, B=8, T=64)
        state, metrics = step(state, batch, 3e-3)
    return metrics["loss"].tolist()


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
