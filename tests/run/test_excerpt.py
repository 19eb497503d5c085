"""The text that a run prints of its model: its own draws, and nothing a terminal obeys."""

import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.checkpoint import open_checkpoint
from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.run import excerpt as module
from niels_gpt.run import session
from niels_gpt.run.excerpt import LENGTH, excerpt, readable
from niels_gpt.run.metrics import CLOCK_FIELDS, read_metrics
from niels_gpt.state import make_state
from tests.trained import lively_state


def files(folder):
    """Return the bytes of the checkpoints of a run, and its metrics without the clock."""
    records = read_metrics(folder / "metrics.jsonl")
    kept = [{k: v for k, v in r.items() if k not in CLOCK_FIELDS} for r in records]
    return {p.name: p.read_bytes() for p in folder.glob("*.pt")}, kept


def test_samples_change_no_bit_of_a_run(train, tmp_path):
    shown = train("--out", "a", "--sample-every-eval")
    silent = train("--out", "b", "--no-sample")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for step in (2, 4, 6, 8):
        assert shown.stdout.count(f"what the model writes after step {step}:") == 1
    assert "what the model writes" not in silent.output
    assert train("--out", "c").stdout.count("what the model writes after step 8:") == 1
    resumed = train("--resume", "a/latest.pt", "--sample-every-eval")
    assert resumed.stdout.count("what the model writes after step 8:") == 1


def test_an_evaluation_that_is_made_up_shows_one_text(train, tmp_path, monkeypatch):
    def stopped(*args, **more):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    train("--out", "a", total_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(session, "evaluate", stopped)
        assert train("--resume", "a/latest.pt", total_steps=6).exit_code == 130
    assert open_checkpoint(tmp_path / "a" / "latest.pt").step == 6
    result = train("--resume", "a/latest.pt", "--sample-every-eval", total_steps=6)
    assert result.stdout.count("what the model writes after step 6:") == 1


def test_nothing_is_read_or_changed_but_the_state():
    state = lively_state()
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    first = excerpt(state)
    assert torch.equal(torch.get_rng_state(), generator)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        assert excerpt(state) == first != excerpt(state._replace(step=1))
    assert torch.get_num_threads() == threads


def test_an_excerpt_has_the_length_that_is_said():
    state = make_state(ModelConfig(T=32, C=8, L=1, H=2, d_ff=8), TrainConfig())
    assert 0 < len(excerpt(state)) <= LENGTH


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_what_a_terminal_obeys_is_not_in_it(text):
    shown = readable(text)
    assert all(c.isprintable() or c in "\n\t" for c in shown)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (b"a\x1b[2Jb\x07c\rd\x00e", "a\ufffd[2Jb\ufffdc\ufffdd\ufffde"),
        ("a\u202eb\u200bc\x9bd".encode(), "a\ufffdb\ufffdc\ufffdd"),
        ("ä\nö\tü".encode() + "ß".encode()[:1], "ä\nö\tü"),
        (b"\n\nA line.\n\n", "A line."),
    ],
)
def test_a_text_is_shown_as_it_is_but_for_that(text, shown):
    assert readable(text) == shown


@pytest.mark.parametrize("phase", ["end", "evaluation"])
def test_ctrl_c_in_a_sample_loses_nothing(train, tmp_path, monkeypatch, phase):
    def stopped(state):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    with monkeypatch.context() as patch:
        patch.setattr(session, "excerpt", stopped)
        more = ["--sample-every-eval"] if phase == "evaluation" else []
        result = train("--out", "a", *more)
    assert result.exit_code == 130, result.output
    assert open_checkpoint(tmp_path / "a" / "latest.pt").step == (8 if phase == "end" else 2)
    assert "--resume a/latest.pt" in result.stderr
    assert train("--resume", "a/latest.pt").exit_code == 0
    train("--out", "whole")
    assert files(tmp_path / "a") == files(tmp_path / "whole")


def test_a_model_that_cannot_write_ends_no_run(train, monkeypatch):
    def broken(*args, **more):
        raise ValueError("the model's output is not finite")

    monkeypatch.setattr(module, "generate", broken)
    result = train("--out", "a", "--sample-every-eval")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("no sample: the model's output is not finite") == 4


def test_where_nobody_reads_no_text_is_made(train, monkeypatch):
    monkeypatch.setattr("niels_gpt.cli.shared.output.EnduringConsole.is_read", False)
    monkeypatch.setattr(session, "excerpt", None)
    assert train("--out", "a").exit_code == 0


def test_a_sample_that_is_refused_cannot_be_asked_for(train):
    result = train("--no-sample", "--sample-every-eval")
    assert result.exit_code == 2
    assert "--sample-every-eval has no effect with --no-sample" in result.stderr
