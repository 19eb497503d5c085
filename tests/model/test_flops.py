"""The cost model against torch's own counters and hand-checked figures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.imperative import ImperativeGPT
from niels_gpt.config import ModelConfig
from niels_gpt.model.flops import forward_flops, parameter_count, step_flops

configs = st.builds(
    lambda H, half_width, L, d_ff, T, V: ModelConfig(
        V=V, T=T, C=2 * H * half_width, L=L, H=H, d_ff=d_ff, dropout=0.0
    ),
    H=st.integers(1, 4),
    half_width=st.integers(1, 4),
    L=st.integers(1, 3),
    d_ff=st.integers(1, 40),
    T=st.integers(1, 12),
    V=st.just(256),
)


def test_default_model_matches_the_published_figures():
    cfg = ModelConfig()
    assert parameter_count(cfg) == 3_220_992
    assert step_flops(cfg, B=32) / 1e9 == pytest.approx(170.8, abs=0.05)
    assert step_flops(cfg, B=32, exact_causal=False) / 1e9 == pytest.approx(183.6, abs=0.05)


@given(configs)
def test_parameters_are_those_of_the_model(cfg):
    assert parameter_count(cfg) == sum(p.numel() for p in ImperativeGPT(cfg).parameters())


@given(configs, st.integers(1, 3))
def test_full_attention_counts_what_torch_counts(cfg, B):
    """`FlopCounterMode` cannot count fused kernels, and counts all T x T scores in plain ones."""
    model = ImperativeGPT(cfg)
    x = torch.zeros(B, cfg.T, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    assert forward_flops(cfg, B=B, exact_causal=False) == counter.get_total_flops()


@given(configs, st.integers(1, 8), st.integers(1, 8))
def test_rows_add_up(cfg, a, b):
    assert step_flops(cfg, B=a + b) == step_flops(cfg, B=a) + step_flops(cfg, B=b)


@given(configs, st.integers(1, 8))
def test_causal_work_is_the_attended_pairs(cfg, B):
    """Every pair of positions that the mask forbids saves 4 C operations per block."""
    masked = sum(T - (t + 1) for T in [cfg.T] for t in range(T))
    saved = forward_flops(cfg, B=B, exact_causal=False) - forward_flops(cfg, B=B)
    assert saved == B * cfg.L * 4 * cfg.C * masked
