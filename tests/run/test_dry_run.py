"""The cost that a dry run estimates, against the actual cost of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt import ModelConfig, TrainConfig
from niels_gpt.config import OPTIMIZERS
from niels_gpt.data.sources import Given
from niels_gpt.run.dry_run import costs, estimate
from niels_gpt.run.options import TrainOptions
from niels_gpt.run.plan import make_plan
from niels_gpt.units import duration, size

MODEL = ModelConfig(T=16, C=8, L=1, H=2, d_ff=8)


def plan_of(texts, out, **train):
    places = {"wiki": texts / "wiki", "roam": texts / "notes"}
    options = TrainOptions("-", given=Given(places), out=out, dry_run=True)
    cfg = {"B": 2, "eval_steps": 2, **train}
    return make_plan(MODEL, TrainConfig(**cfg), options)


def test_the_disk_estimate_is_the_disk_used(niels, texts, tmp_path):
    sizes = {"total_steps": 5, "ckpt_every": 2, "eval_every": 5, "warmup_steps": 0, "log_every": 5}
    config = tmp_path / "c.json"
    train = {"B": 2, "eval_steps": 2, **sizes}
    model = {"T": 16, "C": 8, "L": 1, "H": 2, "d_ff": 8}
    config.write_text(json.dumps({"model": model, "train": train}))
    said = costs(plan_of(texts, tmp_path / "out", **sizes))
    where = ["--wiki", texts / "wiki", "--roam", texts / "notes", "--out", tmp_path / "out"]
    result = niels("train", "--config", config, "--device", "cpu", *where)
    assert result.exit_code == 0, result.stderr
    files = [path.stat().st_size for path in (tmp_path / "out").glob("*.pt")]
    assert len(files) == said["checkpoint_files"] == 4
    assert max(files) == pytest.approx(said["checkpoint_bytes"], rel=0.01)
    assert sum(files) < said["disk_bytes"]


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 60))
def test_evaluations_are_counted_as_the_loop_makes_them(total, every, done):
    from niels_gpt.run.dry_run import _evaluations
    from niels_gpt.run.loop import evaluation_due
    from niels_gpt.state import make_state

    cfg = TrainConfig(total_steps=total, eval_every=every)
    state = make_state(MODEL, cfg)
    due = [k for k in range(done + 1, total + 1) if evaluation_due(state._replace(step=k))]
    assert _evaluations(cfg, done) == len(due)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_costs_hold_together(texts, tmp_path, optimizer):
    sizes = {"total_steps": 100, "eval_every": 30}
    plan = plan_of(texts, tmp_path / "out", optimizer=optimizer, **sizes)
    c = costs(plan)
    assert c["parameters"] == sum(p.numel() for p in plan.state.params.values())
    assert c["text_bytes_per_step"] == 32
    assert (c["steps"], c["evaluations"], c["other_texts"]) == (100, 4, len(plan.corpus.val) - 1)
    assert c["other_texts"] >= 1
    assert c["seconds"] == pytest.approx(
        100 * c["seconds_per_step"] + (4 + c["other_texts"]) * c["seconds_per_evaluation"]
    )
    assert c["seconds_per_step"] > 0
    held = torch.zeros(1).nbytes * 3 * c["parameters"]
    assert held < c["memory_bytes"] < c["memory_here_bytes"]


def test_what_metal_holds_is_main_memory_too(texts, tmp_path, monkeypatch):
    plan, GB = plan_of(texts, tmp_path / "out"), 10**9
    assert costs(plan)["memory_bytes"] < 100 * GB
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 100 * GB)
    assert 100 * GB < costs(plan)["memory_bytes"] < 200 * GB


def test_a_resumed_run_costs_what_is_left(texts, tmp_path):
    plan = plan_of(texts, tmp_path / "out", total_steps=10, eval_every=4)
    later = plan._replace(state=plan.state._replace(step=9))
    assert (costs(later)["steps"], costs(later)["evaluations"]) == (1, 1)
    done = plan._replace(state=plan.state._replace(step=10))
    assert (costs(done)["steps"], costs(done)["evaluations"], costs(done)["seconds"]) == (0, 0, 0)


def test_a_resumed_run_adds_the_files_that_are_not_there(texts, niels, tmp_path):
    config, out = tmp_path / "c.json", tmp_path / "out"
    model = {"T": 16, "C": 8, "L": 1, "H": 2, "d_ff": 8}
    train = {"B": 2, "eval_steps": 2, "total_steps": 4, "ckpt_every": 1, "eval_every": 9}
    config.write_text(json.dumps({"model": model, "train": train}))
    where = ["--wiki", texts / "wiki", "--roam", texts / "notes"]
    assert niels("train", "--config", config, *where, "--out", out).exit_code == 0
    there = len([*out.glob("*.pt")])
    more = ["--resume", out / "latest.pt", "--set", "train.total_steps=6"]
    for elsewhere, new in ([], 2), (["--out", tmp_path / "b"], 4):
        said = niels("train", *more, *elsewhere, "--dry-run", "--json")
        assert json.loads(said.stdout)["checkpoint_files"] == new
    assert niels("train", *more).exit_code == 0
    assert len([*out.glob("*.pt")]) == there + 2
    earlier = ["--resume", out / "step_0000002.pt", "--set", "train.total_steps=6"]
    said = niels("train", *earlier, "--dry-run", "--json")  # latest.pt and best.pt will be moved
    assert json.loads(said.stdout)["checkpoint_files"] == 6


def test_estimating_writes_nothing_and_leaves_the_state_alone(texts, tmp_path):
    plan = plan_of(texts, tmp_path / "a" / "b")
    before = {name: p.clone() for name, p in plan.state.params.items()}
    global_rng = torch.get_rng_state()
    text = "\n".join(estimate(plan)[1])
    assert all(torch.equal(before[name], p) for name, p in plan.state.params.items())
    assert torch.equal(global_rng, torch.get_rng_state())
    assert not [*tmp_path.rglob("*")]
    for word in ("train/wiki", "parameters", "GFLOP", "time", "memory", "disk", "nothing was"):
        assert word in text
    assert "not enough" not in text


def test_what_does_not_fit_is_said(texts, monkeypatch):
    import niels_gpt.run.dry_run as module

    plan = plan_of(texts, Path("/"))
    monkeypatch.setattr(module, "checkpoint_bytes", lambda plan, state: 10**18)
    _, lines = estimate(plan)
    assert "warning: not enough memory" in lines
    assert "warning: not enough free disk space" in lines


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (38_701_287, "38.7 MB"),
        (999_600, "1 MB"),
        (1, "1 byte"),
    ],
)
def test_sizes_as_people_say_them(n, text):
    assert size(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "0.012 s"),
        (9.6, "10 s"),
        (99.4, "99 s"),
        (99.96, "2 min"),
        (1980, "33 min"),
        (40000, "11.1 h"),
    ],
)
def test_durations_as_people_say_them(seconds, text):
    assert duration(seconds) == text
