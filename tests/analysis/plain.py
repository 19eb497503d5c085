"""A tiny model, and its gradients by the plain module, to hold figures to."""

import torch
import torch.nn.functional as F

from niels_gpt import ModelConfig
from niels_gpt.state import to_modules

TINY = ModelConfig(V=16, T=8, C=4, L=1, H=1, d_ff=4, dropout=0.0)
STREAM = bytes((i * i + i // 7) % 16 for i in range(2000))


def flat_gradient(model, x, y):
    """Differentiate the plain module, on one batch, backwards."""
    model.zero_grad()
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def row_gradients(state, x, y):
    model, _ = to_modules(state)
    model.eval()
    return torch.stack([flat_gradient(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
