"""What is checked, and told, before the first step."""

from contextlib import nullcontext

import pytest

from niels_gpt import schema
from niels_gpt.checkpoint import checkpoint_of, open_checkpoint, write_checkpoint
from niels_gpt.config import TrainConfig
from niels_gpt.run import origin, plan
from niels_gpt.state import make_state
from tests.checkpoints import TINY

WIDE = ["model.C=16384", "model.L=64", "model.d_ff=65536", "model.H=2"]


def test_a_run_cannot_end_before_the_step_that_it_resumes(train, tmp_path):
    train("--out", "a", total_steps=6)
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    for more in ([], ["--dry-run"], ["--out", "b"]):
        result = train("--resume", "a/latest.pt", *more, total_steps=3)
        assert result.exit_code == 2
        assert result.stderr == (
            "error: a/latest.pt: has finished 6 steps, but train.total_steps is 3: "
            "set it to more than 6, or resume from an earlier checkpoint\n"
        )
        assert result.stdout == ""
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    assert train("--resume", "a/latest.pt", total_steps=6).exit_code == 0
    assert train("--resume", "a/step_0000003.pt", total_steps=3).exit_code == 0
    assert open_checkpoint(tmp_path / "a" / "latest.pt").step == 3


@pytest.mark.parametrize(
    ("warmup", "told"),
    [
        (3, ""),
        (4, "only rises to 0.000225 and does not reach base_lr=0.0003"),
        (9, "only rises to 0.0001 and does not reach base_lr=0.0003"),
    ],
)
@pytest.mark.parametrize("how", ["--dry-run", "--no-compile"])
def test_a_warmup_that_outlasts_the_run_is_told(train, warmup, told, how):
    result = train(how, "--out", "a", total_steps=4, warmup_steps=warmup)
    assert result.exit_code == 0
    assert (f"note: train.warmup_steps={warmup} is not" in result.output) == bool(told)
    assert told in result.output


def test_a_damaged_log_is_named_and_kept(train, tmp_path):
    train("--out", "a", total_steps=4)
    log = tmp_path / "a" / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:2], b"\0" * 30 + b"\n", *lines[2:]])
    log.write_bytes(damaged)
    result = train("--resume", "a/latest.pt", total_steps=6)
    assert result.exit_code == 0, result.output
    assert "note: a/metrics.jsonl: skipped what is not a record, in line 3" in result.stderr
    kept = tmp_path / "a" / "metrics.damaged-001.jsonl"
    assert str(kept.name) in result.stdout
    assert kept.read_bytes() == damaged
    assert log.read_bytes().startswith(b"".join(lines))


@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_a_model_whose_checkpoints_could_not_be_loaded_is_refused_before_it_is_made(
    niels, tmp_path, monkeypatch, option
):
    """Its checkpoint would take 2.5 TB; making the model would fail in another way."""
    monkeypatch.delattr(origin, "make_state")
    sets = [word for setting in WIDE for word in ("--set", setting)]
    result = niels("train", "--config", "smoke", "--out", tmp_path / "out", *sets, *option)
    assert result.exit_code == 2
    assert "the model is too large: with 206," in result.stderr
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("size", [2356, 2355])
def test_what_a_plan_allows_is_what_can_be_saved(tmp_path, monkeypatch, size):
    """192 parameters and AdamW's moments in float32, and 13 counts of its steps: 2,356 bytes."""
    monkeypatch.setattr(plan, "MAX_TENSOR_BYTES", size)
    monkeypatch.setattr(schema, "MAX_TENSOR_BYTES", size)
    checkpoint = checkpoint_of(make_state(TINY, TrainConfig())._replace(step=1))
    with refused(size < 2356, "a checkpoint would take 2,356 bytes, and 2,355 can be loaded"):
        plan._check_size(TINY, TrainConfig())
    with refused(size < 2356, "its tensors take 2,356 bytes, more than 2,355"):
        write_checkpoint([tmp_path / "a.pt"], checkpoint)


def refused(whether, message):
    return pytest.raises(ValueError, match=message) if whether else nullcontext()
