"""The law, the worth of repeated text, and the runs that it describes."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from niels_gpt.analysis.scaling import (
    REPEATS,
    SHAPES,
    Law,
    Text,
    base_lr,
    beyond_the_runs,
    distinct_bytes,
    matrix_count,
    model_config,
    train_config,
)
from niels_gpt.config import ModelConfig, load_config_from_json
from niels_gpt.lr_schedule import lr_of_step
from tests import ROOT

laws = st.builds(
    Law,
    E=st.floats(0.1, 1.5),
    A=st.floats(0.01, 2),
    a=st.floats(0.1, 0.9),
    B=st.floats(0.01, 2),
    b=st.floats(0.1, 0.9),
)
counts = st.floats(1e4, 1e10)
sizes = st.integers(1, 10**9)


@given(law=laws, N=counts, D=counts, more=st.floats(1.01, 100))
def test_more_parameters_and_more_text_help_and_never_go_below_the_floor(law, N, D, more):
    assert law.loss(N, D) > law.loss(N * more, D) > law.E
    assert law.loss(N, D) > law.loss(N, D * more) > law.E


def test_the_law_counts_in_millions():
    law = Law(E=0.7, A=0.2, a=0.5, B=0.9, b=0.25)
    assert law.loss(1e6, 1e6) == pytest.approx(1.8)
    assert law.loss(4e6, 16e6) == pytest.approx(0.7 + 0.1 + 0.45)


@given(D=st.floats(0, 1e10), U=sizes)
def test_text_is_worth_its_bytes_until_it_repeats_and_less_from_then_on(D, U):
    worth = distinct_bytes(D, {"wiki": Text(1.0, U)})
    if D <= U:
        assert worth == pytest.approx(D)
    else:
        assert U <= worth <= min(D, U * (1 + REPEATS)) * (1 + 1e-9)


@given(U=sizes, a=st.floats(0, 200), b=st.floats(0, 200))
def test_reading_on_is_never_worth_less(U, a, b):
    text = {"wiki": Text(1.0, U)}
    assume(a < b)
    assert distinct_bytes(a * U, text) <= distinct_bytes(b * U, text) * (1 + 1e-9)


def test_four_repetitions_are_nearly_new_text_and_forty_are_not_as_in_the_paper():
    text = {"wiki": Text(1.0, 1000)}
    assert distinct_bytes(4000, text, 15.39) == pytest.approx(3727, rel=1e-3)
    assert distinct_bytes(40_000, text, 15.39) == pytest.approx(15_169, rel=1e-3)


def test_each_source_of_a_mix_repeats_for_itself():
    mix = {"wiki": Text(0.75, 10**6), "roam": Text(0.25, 100)}
    alone = distinct_bytes(250, {"roam": Text(1.0, 100)})
    assert distinct_bytes(1000, mix) == pytest.approx(750 + alone)


def test_the_embedding_is_not_counted():
    cfg = ModelConfig(C=64, L=2, H=2, d_ff=256)
    assert matrix_count(cfg) == 2 * (12 * 64**2 + 256 + 5 * 64) + 2 * 64


@given(heads=st.integers(1, 20), L=st.integers(1, 8))
def test_the_networks_have_heads_of_one_width_and_no_dropout(heads, L):
    cfg = model_config(32 * heads, L)
    assert (cfg.C // cfg.H, cfg.d_ff, cfg.dropout) == (32, 4 * cfg.C, 0)


@given(steps=st.integers(2, 10_000), lr=st.floats(1e-4, 0.1))
def test_a_schedule_ends_at_zero(steps, lr):
    cfg = train_config(8, steps, lr, {"wiki": 1.0})
    assert lr_of_step(steps - 1, cfg) == 0 or steps < 3
    assert max(lr_of_step(k, cfg) for k in (0, cfg.warmup_steps)) == lr
    assert math.isclose(cfg.warmup_steps, steps / 10, abs_tol=0.5)


def test_the_rate_falls_with_the_width():
    assert [base_lr(C) for C, _ in SHAPES] == sorted((base_lr(C) for C, _ in SHAPES), reverse=True)
    assert base_lr(128) == 0.014


@pytest.mark.parametrize(
    ("name", "beyond"), [("half-hour", False), ("hour", False), ("night", True)]
)
def test_a_run_much_larger_than_those_of_the_law_is_told(name, beyond):
    cfg, schedule = load_config_from_json(ROOT / "configs" / f"{name}.json")
    D = schedule.total_steps * schedule.B * cfg.T
    lines = beyond_the_runs(cfg, D, schedule.total_steps)
    assert [line for line in lines if "do not rely on the interval" in line] == lines
    assert bool(lines) is beyond
