"""`niels-gpt config fit`: from a time and a text to a config, on a clock that is replaced."""

from __future__ import annotations

import json
from functools import partial
from itertools import count

import pytest

from niels_gpt import paths
from niels_gpt.analysis import fit
from niels_gpt.config import load_config_from_json


@pytest.fixture
def run(niels, texts, tmp_path, monkeypatch):
    """Run the command on a small text and a machine that measures the same each time."""
    monkeypatch.setattr(paths, "REPO_ROOT", tmp_path / "root")
    monkeypatch.setattr(paths, "CONFIG_DIR", tmp_path / "configs")
    ticks = count()
    monkeypatch.setattr(fit, "MEASURED", ((32, 1),))
    clock = partial(fit.measure, clock=lambda: 0.01 * next(ticks))
    monkeypatch.setattr(fit, "measure", clock)
    where = ["--wiki", texts / "wiki", "--roam", texts / "notes", "--device", "cpu"]
    return lambda *args: niels("config", "fit", *where, *args)


def test_the_config_is_written_and_loads(run, tmp_path):
    result = run("--time", "20m")
    assert result.exit_code == 0, result.output
    path = tmp_path / "configs" / "fit-20m.json"
    model, train = load_config_from_json(path)
    assert (train.optimizer, train.init, train.min_lr, model.dropout) == ("muon", "fan_in", 0, 0)
    assert train.p_train.keys() == {"wiki", "roam", "primer"}
    assert f"written to {path}" in result.stdout
    for what in ("speed", "time", "network", "batch", "steps", "lr", "warmup", "loss"):
        assert f"\n{what} " in "\n" + result.stdout
    assert f"C={model.C}, L={model.L}" in result.stdout
    assert f"{train.total_steps:,}: " in result.stdout


def test_the_json_holds_the_same(run, tmp_path):
    out = tmp_path / "mine.json"
    result = run("--time", "20m", "--out", out, "--json")
    value = json.loads(result.stdout)
    assert value["out"] == str(out)
    assert value["config"] == json.loads(out.read_text())
    assert value["expected"]["low"] < value["expected"]["nats"] < value["expected"]["high"]


def test_text_that_is_too_small_for_the_time_is_told(run):
    assert "warning: the text is too small for this time" in run("--time", "8h").stdout


def test_a_file_that_is_there_is_not_overwritten(run, tmp_path):
    out = tmp_path / "mine.json"
    out.write_text("{}")
    result = run("--time", "20m", "--out", out)
    assert result.exit_code == 2
    assert f"{out}: " in result.stderr
    assert out.read_text() == "{}"


@pytest.mark.parametrize("time", ["", "soon", "-8h", "0s", "8"])
def test_nonsense_is_no_time(run, tmp_path, time):
    result = run("--time", time)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is not a time" in result.stderr or "more than nothing" in result.stderr
    assert not (tmp_path / "configs").exists()


def test_a_time_too_short_for_anything_is_refused_with_one_that_is_not(run, tmp_path):
    result = run("--time", "7s")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "too short for anything" in result.stderr
    assert not (tmp_path / "configs").exists()
    assert run("--time", result.stderr.split()[-1]).exit_code == 0
