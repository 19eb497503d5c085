"""The cost of a config: parameters and floating point operations. Arithmetic only.

A multiply-add counts as two operations, and only matrix products count: at the sizes this trainer
is made for, everything else is bound by memory. The backward pass costs twice the forward pass.
"""

from __future__ import annotations

from niels_gpt.config import ModelConfig


def parameter_count(cfg: ModelConfig) -> int:
    """Count distinct parameters; the tied output layer is the embedding."""
    C = cfg.C
    layer_norm = 2 * C
    mlp_biases = cfg.d_ff + C
    block = _block_matrix_size(cfg) + mlp_biases + 2 * layer_norm
    return cfg.V * C + cfg.L * block + layer_norm


def forward_flops(
    cfg: ModelConfig, *, B: int, T: int | None = None, exact_causal: bool = True
) -> int:
    """Count the operations of one forward pass over B rows of T bytes (default `cfg.T`).

    With `exact_causal`, position t attends to t + 1 positions, the minimum; otherwise to all T, as
    in an attention that also computes the masked half.
    """
    T = cfg.T if T is None else T
    attended = T * (T + 1) // 2 if exact_causal else T * T
    dense = 2 * T * (cfg.L * _block_matrix_size(cfg) + cfg.V * cfg.C)
    attention = cfg.L * 4 * cfg.C * attended  # q k^T and probabilities times v
    return B * (dense + attention)


def step_flops(cfg: ModelConfig, *, B: int, T: int | None = None, exact_causal: bool = True) -> int:
    """Count the operations of one training step: a forward pass and its gradient."""
    return 3 * forward_flops(cfg, B=B, T=T, exact_causal=exact_causal)


def _block_matrix_size(cfg: ModelConfig) -> int:
    return 4 * cfg.C * cfg.C + 2 * cfg.C * cfg.d_ff
