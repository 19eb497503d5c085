"""Train with an optimizer of your own: Lion (Chen et al. 2023, arXiv 2302.06675).

Example: python examples/own_optimizer.py text.txt
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch

import niels_gpt


class LionState(NamedTuple):
    average: dict[str, torch.Tensor]


def init(params):
    return LionState({name: torch.zeros_like(p) for name, p in params.items()})


def lion(params, grads, opt_state, *, count, lr, weight_decay):
    sign = {n: m.lerp(grads[n], 0.1).sign() for n, m in opt_state.average.items()}
    new = {n: p * (1 - lr * weight_decay) - lr * sign[n] for n, p in params.items()}
    return new, LionState({n: m.lerp(grads[n], 0.01) for n, m in opt_state.average.items()})


def main(text: Path, steps: int = 20) -> float:
    """Return the last training loss, in nats."""
    sources = {"text": text.read_bytes()}
    model_cfg = niels_gpt.ModelConfig(T=64, C=64, L=2, H=2, d_ff=256, dropout=0.0)
    params = niels_gpt.make_state(model_cfg, niels_gpt.TrainConfig()).params
    own = niels_gpt.Optimizer(init, lion)
    opt_state = own.init(params)
    for k in range(steps):
        batch = niels_gpt.batch_of_step(42, k, sources, p={"text": 1.0}, B=8, T=64)
        grads, loss = niels_gpt.gradients(params, batch, model_cfg)
        numbers = {"count": k + 1, "lr": 1e-3, "weight_decay": 0.1, "max_norm": 1.0}
        params, opt_state, _ = niels_gpt.update(own, params, grads, opt_state, **numbers)
    return loss.item()


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
