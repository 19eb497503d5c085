"""What is checked, and told, before the first step."""

import pytest

from niels_gpt.checkpoint import open_checkpoint


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
