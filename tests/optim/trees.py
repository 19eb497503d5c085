"""Small trees of generated tensors."""

import torch
from hypothesis import strategies as st

SHAPES = {"w": (3, 4), "b": (4,), "one": (1,)}

# From gradients far below eps to such whose square overflows only when 1e4 times larger.
scales = st.sampled_from([0.0, 1e-12, 1e-8, 1e-4, 1.0, 1e4, 1e15])


def random_tree(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) * scale for n, s in SHAPES.items()}


def zeros():
    return {n: torch.zeros(s) for n, s in SHAPES.items()}
