"""The run for a time: parsing, costs on a replaced clock, and the choice by the law."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.analysis import fit, scaling
from niels_gpt.analysis.fit import Cost, choose, parse_time
from niels_gpt.analysis.scaling import Text
from niels_gpt.config import TrainConfig
from niels_gpt.corpus import Corpus
from niels_gpt.model.flops import step_flops
from niels_gpt.run.plan import COMPILE_FLOPS

ENDLESS = {"wiki": Text(1.0, 10**15)}
LAPTOP = [Cost(C, 1 / 60e9, 1 / 20e9) for C in (64, 128, 256, 384)]
times = st.floats(20, 30 * 86_400)
texts = st.builds(
    lambda share, wiki, roam: {"wiki": Text(share, wiki), "roam": Text(1 - share, roam)},
    st.floats(0.05, 0.95),
    st.integers(10_000, 10**9),
    st.integers(10_000, 10**9),
)
speeds = st.lists(st.floats(1e9, 1e13), min_size=1, max_size=4).map(
    lambda rates: [
        Cost(C, 1 / r, 0.5 / r) for C, r in zip((64, 128, 256, 384), rates, strict=False)
    ]
)


def chosen(seconds, costs=LAPTOP, texts=ENDLESS, compiles=False):
    return choose(seconds, costs, texts, 256, compiles=compiles)[0]


# --- times -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("20m", 1200), ("8h", 28_800), ("1.5h", 5400), (" 2d ", 172_800)],
)
def test_a_time_is_a_number_and_a_unit(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "8", "h", "8 h", "-8h", "0s", "1e3s", "8hours", "9999d", "٣h"]
)
def test_nonsense_is_no_time(text):
    with pytest.raises(ValueError, match=r"time|year"):
        parse_time(text)


@given(n=st.integers(1, 300), unit=st.sampled_from("smhd"))
def test_every_whole_time_is_understood(n, unit):
    assert parse_time(f"{n}{unit}") == n * fit.UNITS[unit]


# --- the choice --------------------------------------------------------------------------------


@given(seconds=times, longer=st.floats(1, 50), costs=speeds, texts=texts, compiles=st.booleans())
def test_more_time_never_promises_a_higher_loss(seconds, longer, costs, texts, compiles):
    try:
        short = chosen(seconds, costs, texts, compiles)
    except ValueError:
        return
    assert chosen(seconds * longer, costs, texts, compiles).expected.nats <= short.expected.nats


@pytest.mark.parametrize("rate", [5e10, 1e12, 2e13])
def test_where_compiling_begins_no_bytes_are_lost(rate):
    """On a fast machine, compiling takes longer than it saves there."""
    costs = [Cost(64, 1 / rate, 0.0)]
    crossing = COMPILE_FLOPS / rate / fit.STEPS_SHARE + fit.START_SECONDS
    around = [max(crossing, 20) * (0.9 + 0.02 * k) for k in range(80)]
    nats = [chosen(seconds, costs, compiles=True).expected.nats for seconds in around]
    assert nats == sorted(nats, reverse=True)


@given(seconds=times, factor=st.floats(1, 20), texts=texts)
def test_a_faster_machine_never_promises_a_higher_loss(seconds, factor, texts):
    faster = [Cost(c.C, c.row / factor, c.update / factor) for c in LAPTOP]
    try:
        slow = chosen(seconds, texts=texts)
    except ValueError:
        return
    assert chosen(seconds, faster, texts).expected.nats <= slow.expected.nats


@given(seconds=times, costs=speeds, compiles=st.booleans())
def test_the_steps_fit_into_the_time(seconds, costs, compiles):
    try:
        choices = choose(seconds, costs, ENDLESS, 256, compiles=compiles)
    except ValueError:
        return
    for run in choices:
        taken = run.steps * fit.step_seconds(run.model_cfg, run.B, costs)
        if compiles and run.steps * step_flops(run.model_cfg, B=run.B) >= COMPILE_FLOPS:
            taken = taken * fit.COMPILED + fit.COMPILE_SECONDS
        assert taken <= (seconds - fit.START_SECONDS) * fit.STEPS_SHARE * (1 + 1e-9)
        assert run.steps >= fit.BATCHES[run.B]


@given(seconds=times, U=st.integers(20_000, 10**8), more=st.integers(2, 1000))
def test_less_text_never_promises_a_lower_loss_nor_a_larger_network(seconds, U, more):
    few = chosen(max(seconds, 60), texts={"wiki": Text(1.0, U)})
    many = chosen(max(seconds, 60), texts={"wiki": Text(1.0, U * more)})
    assert many.expected.nats <= few.expected.nats + 1e-12


def test_few_unique_bytes_bound_the_size():
    night = 8 * 3600
    small = chosen(night, texts={"wiki": Text(1.0, 300_000)})
    assert small.model_cfg.C < chosen(night).model_cfg.C
    assert small.expected.nats > chosen(night).expected.nats + 0.1


def test_too_short_a_time_names_one_that_is_enough():
    with pytest.raises(ValueError, match="too short for anything") as caught:
        chosen(6.5)
    enough = float(str(caught.value).rpartition(" ")[2].removesuffix("s"))
    assert scaling.SHAPES[0][0] == chosen(enough).model_cfg.C


def test_beside_the_choice_are_its_neighbours_in_size():
    choices = choose(3600, LAPTOP, ENDLESS, 256, compiles=False)
    widths = [c.model_cfg.C for c in fit._beside(choices)]
    best = choices[0].model_cfg.C
    assert widths == [
        max(c.model_cfg.C for c in choices if best > c.model_cfg.C),
        min(c.model_cfg.C for c in choices if best < c.model_cfg.C),
    ]


@given(seconds=st.floats(30, 10**6))
def test_the_evaluations_of_the_config_cost_what_is_set_aside(seconds):
    run = chosen(seconds)
    cfg = fit.config_of(run, {"wiki": 1.0})
    assert isinstance(cfg, TrainConfig)
    evaluations = math.ceil(cfg.total_steps / cfg.eval_every)
    assert evaluations <= fit.EVALUATIONS
    assert cfg.eval_steps == 1 or cfg.eval_steps * evaluations <= fit.EVALUATED * cfg.total_steps
    assert (cfg.optimizer, cfg.init, cfg.min_lr) == ("muon", "fan_in", 0.0)


# --- what the user is told ---------------------------------------------------------------------


def test_text_that_is_read_too_often_is_told_and_enough_text_is_not():
    small = {"wiki": Text(1.0, 100_000)}
    told = fit.warnings_of(chosen(8 * 3600, texts=small), small)
    assert any("too small for this time" in line for line in told)
    assert not any("too small" in line for line in fit.warnings_of(chosen(600), ENDLESS))


def test_a_run_shorter_than_those_of_the_law_is_told():
    long = chosen(600)
    for choice, told in (long, 0), (long._replace(steps=scaling.SHORTEST - 1), 1):
        lines = fit.warnings_of(choice, ENDLESS)
        assert sum("this one may end above it" in line for line in lines) == told


def test_other_text_than_that_of_the_law_is_told():
    notes = {"roam": Text(1.0, 10**9)}
    assert any("other text" in line for line in fit.warnings_of(chosen(600, texts=notes), notes))


# --- the costs, on a clock that is replaced ----------------------------------------------------

TEXT = bytes(k * k % 251 for k in range(2000))
CORPUS = Corpus({"wiki": TEXT}, {"wiki": TEXT}, {"wiki": 1.0}, 42, 1, T=16)


class Machine:
    """A clock on which a step takes `update` seconds and `row` seconds a row."""

    def __init__(self, monkeypatch, row, update):
        self.now, step = 0.0, fit.loop_step

        def timed(state, batch, lr):
            self.now += update + row * len(batch[0])
            return step(state, batch, lr)

        monkeypatch.setattr(fit, "loop_step", timed)
        monkeypatch.setattr(fit, "MEASURED", ((32, 1), (64, 1)))

    def __call__(self):
        return self.now


def test_rows_and_updates_are_told_apart(monkeypatch):
    clock = Machine(monkeypatch, row=0.25, update=1.0)
    costs = fit.measure(CORPUS, "cpu", clock)
    assert [cost.C for cost in costs] == [32]  # the first took more than a quarter of the minute
    cfg = scaling.model_config(32, 1, 16)
    for B in (8, 16, 32):
        assert fit.step_seconds(cfg, B, costs) == pytest.approx(1 + 0.25 * B)


def test_a_machine_fast_enough_is_measured_at_every_width(monkeypatch):
    costs = fit.measure(CORPUS, "cpu", Machine(monkeypatch, row=0.01, update=0.0))
    assert [cost.C for cost in costs] == [32, 64]
    assert all(cost.update == pytest.approx(0, abs=1e-12) for cost in costs)


def test_a_clock_that_stands_still_promises_no_miracle(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(fit, "MEASURED", ((32, 1),))
    costs = fit.measure(CORPUS, "cpu", lambda: float(next(ticks)))
    assert costs[0].row > 0
