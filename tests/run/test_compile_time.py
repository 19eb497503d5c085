"""How long compiling took is kept in the cache, by shape, and is told the next time."""

import dataclasses
import re

import pytest

from niels_gpt.config import TrainConfig
from niels_gpt.run import session
from niels_gpt.run.compile_time import MAX_KEPT, expected_time, remember_time
from niels_gpt.state import make_state
from niels_gpt.step import train_step
from tests.checkpoints import TINY


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("niels_gpt.paths.REPO_ROOT", tmp_path)
    return tmp_path / "data" / "cache" / "compile.json"


def state(B=2):
    return make_state(TINY, TrainConfig(B=B))


def test_a_time_is_told_for_the_shape_that_took_it(cache):
    assert "half a minute or more" in expected_time(state())
    remember_time(state(), 51.7)
    assert expected_time(state()) == "this took 52 s last time"
    assert "half a minute or more" in expected_time(state(B=3))
    other = dataclasses.replace(state().train_cfg, optimizer="muon")
    assert "half a minute or more" in expected_time(state()._replace(train_cfg=other))
    remember_time(state(), 9.0)
    assert expected_time(state()) == "this took 9 s last time"


def test_old_times_are_forgotten(cache):
    for B in range(1, MAX_KEPT + 2):
        remember_time(state(B), B)
    assert "a minute" in expected_time(state(1))
    assert "took 2 s" in expected_time(state(2))


@pytest.mark.parametrize("text", ["", "[]", '{"a": "b"}', "\xff"])
def test_a_damaged_file_is_no_time(cache, text):
    cache.parent.mkdir(parents=True)
    cache.write_text(text, encoding="latin-1")
    assert "a minute" in expected_time(state())
    remember_time(state(), 4)
    assert "took 4 s" in expected_time(state())


def test_a_cache_that_cannot_be_written_costs_nothing(cache, tmp_path):
    (tmp_path / "data").write_text("no folder")
    remember_time(state(), 4)
    assert "a minute" in expected_time(state())


def test_a_run_says_that_it_compiles_and_remembers_the_time(train, cache, monkeypatch):
    monkeypatch.setattr(session, "choose_step", lambda state, batch, say: (train_step, True))
    first = train("--out", "a", "--compile", total_steps=1)
    assert "compiling the step: this takes half a minute or more the first time" in first.stdout
    again = train("--out", "b", "--compile", total_steps=1)
    assert re.search(r"compiling the step: this took \d+ s last time", again.stdout)
    monkeypatch.setattr(session, "choose_step", lambda state, batch, say: (train_step, False))
    cache.unlink()
    train("--out", "c", "--compile", total_steps=1)
    assert not cache.exists()
