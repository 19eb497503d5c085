"""What a run does when the disk, the numbers or the log fail."""

import errno
import json
import signal
from types import SimpleNamespace

import pytest

from niels_gpt.checkpoint import load_checkpoint
from niels_gpt.cli.shared.output import EnduringConsole
from niels_gpt.corpus import Corpus
from niels_gpt.eval import Scores
from niels_gpt.files import durable
from niels_gpt.run import folder, progress
from tests.run.test_dry_run import plan_of

CONFIG = {
    "model": {"T": 16, "C": 8, "L": 1, "H": 2, "d_ff": 8},
    "train": {
        "B": 4,
        "total_steps": 6,
        "eval_every": 6,
        "eval_steps": 1,
        "ckpt_every": 2,
        "log_every": 2,
        "warmup_steps": 0,
    },
}


@pytest.fixture
def train(niels, texts, tmp_path):
    config = tmp_path / "c.json"
    config.write_text(json.dumps(CONFIG))
    where = ["--wiki", texts / "wiki", "--roam", texts / "notes", "--out", tmp_path / "out"]
    return lambda *args: niels("train", "--config", config, "--device", "cpu", *where, *args)


def full_disk(path):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_failed_save_is_told_and_the_next_one_tries_again(train, tmp_path, monkeypatch):
    write, tried = folder.write_checkpoint, []

    def write_later(paths, checkpoint):
        tried.append(checkpoint.step)
        return full_disk(paths[0]) if checkpoint.step == 4 else write(paths, checkpoint)

    monkeypatch.setattr(folder, "write_checkpoint", write_later)
    result = train()
    assert result.exit_code == 0, result.stderr
    assert tried == [2, 4, 6, 6]
    assert "SAVE FAILED after step 4" in result.stderr
    assert "No space left on device" in result.stderr
    assert f"last good checkpoint: {tmp_path / 'out' / 'latest.pt'}" in result.stderr
    assert load_checkpoint(tmp_path / "out" / "latest.pt", device="cpu")["step"] == 6


@pytest.mark.parametrize("stopped", [False, True])
def test_a_failed_final_save_is_exit_code_1(train, monkeypatch, stopped):
    monkeypatch.setattr(folder, "write_checkpoint", lambda paths, checkpoint: full_disk(paths[0]))
    draw = Corpus.batch

    def batch(corpus, k, device):
        if stopped and k == 4:
            signal.raise_signal(signal.SIGTERM)
        return draw(corpus, k, device)

    monkeypatch.setattr(Corpus, "batch", batch)
    result = train()
    assert result.exit_code == 1
    assert "SAVE FAILED" in result.stderr
    assert result.stderr.count("no checkpoint yet") >= 2
    assert ("stopped by SIGTERM" if stopped else "the final save failed") in result.stderr


def test_numbers_that_are_not_finite_end_the_run_with_what_is_good_named(train, tmp_path):
    good = train("--set", "train.total_steps=2")
    assert good.exit_code == 0
    more = ["--set", "train.base_lr=1e30", "--set", "train.min_lr=1e30"]
    latest = tmp_path / "out" / "latest.pt"
    before = latest.read_bytes()
    result = train("--resume", latest, "--set", "train.total_steps=9", *more)
    assert result.exit_code == 1
    assert "of step " in result.stderr
    assert "batch key: seed and step" in result.stderr
    assert f"last good checkpoint: {latest}" in result.stderr
    assert "Traceback" not in result.stderr
    assert latest.read_bytes() == before


def test_a_log_that_cannot_be_written_costs_no_checkpoint_and_no_record(
    train, tmp_path, monkeypatch
):
    append, failures = durable.append_bytes, iter(range(2))

    def append_later(path, data):
        return append(path, data) if next(failures, None) is None else full_disk(path)

    monkeypatch.setattr(durable, "append_bytes", append_later)
    result = train()
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("No space left on device") == 2
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 4, 6, 6]


def test_on_a_terminal_a_line_shows_where_the_run_is(train, monkeypatch):
    monkeypatch.setattr(EnduringConsole, "is_live", True)
    shown = train().stderr
    for words in ("step 1/6  loss ", " left  ", " bytes/s  ", "  lr 0.0003"):
        assert words in shown, words


def test_the_speed_is_that_of_the_steps_alone(texts, tmp_path, monkeypatch):
    """The time of an evaluation and of a text that is shown counts, but not for the speed."""
    clock, records = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    plan = plan_of(texts, tmp_path / "out", total_steps=6)
    metrics = SimpleNamespace(add=records.append)
    console = SimpleNamespace(say=lambda *lines: None, is_live=False)
    reporter = progress.Reporter(plan, metrics, console)
    bytes_per_step = plan.corpus.B * plan.corpus.T
    for seconds, report in [
        (2.0, lambda: reporter.on_log(2, 0.1, {"loss": 1.0})),
        (8.0, lambda: reporter.on_eval(2, Scores(1.0, 2, 1.0, 2))),
        (1.0, lambda: reporter.on_log(4, 0.1, {"loss": 1.0})),
        (5.0, lambda: reporter.on_text(4, "A text.")),
        (4.0, lambda: reporter.on_log(5, 0.1, {"loss": 1.0})),
    ]:
        clock.now += seconds
        report()
    assert [r.get("bytes_per_s") for r in records] == [
        bytes_per_step,
        None,
        2 * bytes_per_step,
        round(bytes_per_step / 4),
    ]
    assert [r["seconds"] for r in records] == [2.0, 10.0, 11.0, 20.0]
