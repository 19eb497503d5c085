"""The learning rate schedule: pr-06's acceptance tests, then its laws over all legal arguments."""

import math
import sys
from fractions import Fraction

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from niels_gpt import config
from niels_gpt.config import TrainConfig
from niels_gpt.lr_schedule import DECAYS, lr_at_step, lr_of_step

TOTAL = 1000
SMOKE = {"base_lr": 3e-4, "warmup_steps": 200, "min_lr": 3e-5}


def curve(total_steps, **kwargs):
    return [lr_at_step(step, total_steps, **kwargs) for step in range(total_steps)]


# --- pr-06 -------------------------------------------------------------------------------------


def test_starts_at_zero():
    assert lr_at_step(0, TOTAL, **SMOKE) == 0.0


def test_reaches_base_lr_after_warmup():
    assert lr_at_step(200, TOTAL, **SMOKE) == pytest.approx(3e-4, rel=1e-12)


def test_ends_at_min_lr():
    assert lr_at_step(TOTAL - 1, TOTAL, **SMOKE) == pytest.approx(3e-5, rel=1e-12)


def test_never_falls_during_warmup_and_never_rises_after_it():
    lrs = curve(TOTAL, **SMOKE)
    assert lrs[:201] == sorted(lrs[:201])
    assert lrs[200:] == sorted(lrs[200:], reverse=True)


# --- laws --------------------------------------------------------------------------------------

rates = st.one_of(
    st.floats(0, sys.float_info.max),
    st.sampled_from([0.0, 5e-324, 3e-5, 3e-4, 1.0, sys.float_info.max]),
    st.integers(0, 10),
)
totals = st.one_of(st.integers(1, 6), st.integers(1, 10**4), st.integers(1, 10**12))


@st.composite
def schedules(draw):
    """Any legal (total_steps, the rest), close calls between warmup and total included."""
    total = draw(totals)
    near = st.integers(max(0, total - 3), total + 3)
    warmup = draw(st.one_of(st.integers(0, 3), near, st.integers(0, 2 * total)))
    min_lr, base_lr = sorted([draw(rates), draw(rates)])
    decay = draw(st.sampled_from(sorted(DECAYS)))
    return total, {
        "base_lr": base_lr,
        "warmup_steps": warmup,
        "min_lr": min_lr,
        "decay": decay,
    }


@st.composite
def neighbours(draw):
    """A schedule and two steps of it, the first before the second, mostly next to each other."""
    total, kwargs = draw(schedules().filter(lambda schedule: schedule[0] > 1))
    edges = [0, kwargs["warmup_steps"] - 1, kwargs["warmup_steps"], total - 2]
    starts = st.one_of(st.integers(0, total - 2), st.sampled_from(edges))
    step = draw(starts.filter(lambda step: 0 <= step <= total - 2))
    gap = draw(st.one_of(st.just(1), st.integers(1, total - 1 - step)))
    return step, step + gap, total, kwargs


@settings(max_examples=300)
@given(neighbours())
def test_is_monotone_on_each_side_of_the_peak(case):
    first, second, total, kwargs = case
    warmup = kwargs["warmup_steps"]
    a, b = lr_at_step(first, total, **kwargs), lr_at_step(second, total, **kwargs)
    if second <= warmup:
        assert a <= b
    if first >= warmup:
        assert a >= b


@settings(max_examples=30)
@given(
    st.integers(2, 3000),
    st.floats(0, 1e3, allow_subnormal=False),
    st.floats(0, 1e3, allow_subnormal=False),
    st.integers(0, 50),
    st.sampled_from(sorted(DECAYS)),
)
@example(2999, 1.0, 1.0 - 2**-53, 0, "cosine")
@example(2999, 1.0, 1.0 - 2**-53, 0, "linear")
@example(2999, 5e-324, 0.0, 7, "cosine")
def test_is_monotone_along_a_whole_curve(total, one_lr, other_lr, warmup, decay):
    min_lr, base_lr = sorted([one_lr, other_lr])
    lrs = curve(total, base_lr=base_lr, warmup_steps=warmup, min_lr=min_lr, decay=decay)
    assert lrs[: warmup + 1] == sorted(lrs[: warmup + 1])
    assert lrs[warmup:] == sorted(lrs[warmup:], reverse=True)


@settings(max_examples=300)
@given(schedules(), st.data())
def test_stays_in_its_range(schedule, data):
    total, kwargs = schedule
    step = data.draw(st.integers(0, total - 1))
    lr = lr_at_step(step, total, **kwargs)
    assert type(lr) is float
    low = kwargs["min_lr"] if step >= kwargs["warmup_steps"] else 0
    assert low <= lr <= kwargs["base_lr"]


def test_rounding_does_not_lift_it_above_the_peak():
    assert 0.155 + (0.431 - 0.155) > 0.431
    assert lr_at_step(1, 10**9, base_lr=0.431, warmup_steps=0, min_lr=0.155) <= 0.431


@settings(max_examples=200)
@given(schedules())
@example((9, {"base_lr": 0.705, "warmup_steps": 2, "min_lr": 0.194}))  # min + (base - min) < base
def test_the_ends_are_exact(schedule):
    total, kwargs = schedule
    warmup = kwargs["warmup_steps"]
    if warmup > 0:
        assert lr_at_step(0, total, **kwargs) == 0.0
    if warmup < total:
        assert lr_at_step(warmup, total, **kwargs) == kwargs["base_lr"]
    if warmup < total - 1:
        assert lr_at_step(total - 1, total, **kwargs) == kwargs["min_lr"]


@settings(max_examples=200)
@given(schedules(), st.data())
def test_warmup_is_a_straight_line(schedule, data):
    total, kwargs = schedule
    warmup = kwargs["warmup_steps"]
    assume(warmup > 0)
    step = data.draw(st.integers(0, min(total, warmup) - 1))
    exact = Fraction(kwargs["base_lr"]) * step / warmup
    lr = lr_at_step(step, total, **kwargs)
    assert math.isclose(lr, float(exact), rel_tol=1e-12, abs_tol=1e-320)


@settings(max_examples=200)
@given(schedules(), st.data())
def test_decay_is_point_symmetric_about_the_mean_rate(schedule, data):
    total, kwargs = schedule
    warmup, last = kwargs["warmup_steps"], total - 1
    assume(warmup < last)
    assume(kwargs["base_lr"] <= 1e300)
    ahead = data.draw(st.integers(0, last - warmup))
    pair = lr_at_step(warmup + ahead, total, **kwargs) + lr_at_step(last - ahead, total, **kwargs)
    expected = kwargs["base_lr"] + kwargs["min_lr"]
    assert math.isclose(pair, expected, rel_tol=1e-12, abs_tol=1e-320)


def test_decay_follows_the_cosine():
    lrs = curve(101, base_lr=1.0, warmup_steps=0, min_lr=0.0)
    assert lrs[25] == pytest.approx((1 + math.sqrt(0.5)) / 2, rel=1e-12)
    assert lrs[50] == pytest.approx(0.5, rel=1e-12)
    assert lrs[75] == pytest.approx((1 - math.sqrt(0.5)) / 2, rel=1e-12)


def test_a_linear_decay_is_a_straight_line():
    lrs = curve(101, base_lr=1.0, warmup_steps=0, min_lr=0.5, decay="linear")
    assert lrs == pytest.approx([1 - k / 200 for k in range(101)], rel=1e-12)


def test_the_decay_is_a_cosine_if_nothing_is_said():
    assert curve(50, **SMOKE) == curve(50, **SMOKE, decay="cosine")
    assert TrainConfig().lr_decay == "cosine"


def test_the_config_knows_the_decays():
    assert tuple(DECAYS) == config.LR_DECAYS


@pytest.mark.parametrize("decay", DECAYS)
def test_a_run_takes_its_schedule_from_its_config(decay):
    cfg = TrainConfig(total_steps=50, warmup_steps=7, base_lr=0.5, min_lr=0.125, lr_decay=decay)
    expected = curve(50, warmup_steps=7, base_lr=0.5, min_lr=0.125, decay=decay)
    assert [lr_of_step(step, cfg) for step in range(50)] == expected


@pytest.mark.parametrize(
    ("total", "warmup", "expected"),
    [
        (1, 0, [1.0]),
        (1, 1, [0.0]),
        (1, 9, [0.0]),
        (2, 0, [1.0, 0.5]),
        (2, 1, [0.0, 1.0]),
        (3, 1, [0.0, 1.0, 0.5]),
        (4, 3, [0.0, 1 / 3, 2 / 3, 1.0]),
        (4, 8, [0.0, 0.125, 0.25, 0.375]),
    ],
)
def test_short_runs(total, warmup, expected):
    assert curve(total, base_lr=1.0, warmup_steps=warmup, min_lr=0.5) == pytest.approx(expected)


LEGAL = {"step": 5, "total_steps": 10, "base_lr": 0.1, "warmup_steps": 2, "min_lr": 0.01}


def test_min_lr_above_base_lr_is_refused_with_both():
    with pytest.raises(ValueError, match=r"min_lr=0.2 is above base_lr=0.1"):
        lr_at_step(5, 10, base_lr=0.1, warmup_steps=2, min_lr=0.2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", -1),
        ("step", 10),
        ("step", 2.0),
        ("step", True),
        ("step", "5"),
        ("total_steps", 0),
        ("total_steps", -3),
        ("total_steps", 10.0),
        ("warmup_steps", -1),
        ("warmup_steps", 1.5),
        ("warmup_steps", False),
        ("base_lr", -0.1),
        ("base_lr", math.nan),
        ("base_lr", math.inf),
        ("base_lr", 10**400),
        ("base_lr", "0.1"),
        ("base_lr", True),
        ("min_lr", -0.01),
        ("min_lr", math.nan),
        ("min_lr", None),
        ("decay", "exponential"),
        ("decay", None),
    ],
)
def test_illegal_arguments_are_named_with_their_value(name, value):
    arguments = {**LEGAL, name: value}
    step, total = arguments.pop("step"), arguments.pop("total_steps")
    with pytest.raises(ValueError, match=name) as error:
        lr_at_step(step, total, **arguments)
    assert f"={value!r} must be" in str(error.value)
