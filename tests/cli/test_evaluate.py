"""`niels-gpt evaluate`: the figures of `score`, per source or of a file."""

from __future__ import annotations

import json

import pytest
import torch

from niels_gpt import TrainConfig, evaluate, paths
from niels_gpt.analysis.score import full_windows, score
from niels_gpt.checkpoint import checkpoint_of, open_checkpoint, payload_of, write_checkpoint
from niels_gpt.config import ModelConfig
from tests.trained import lively_state

CFG = ModelConfig(T=16, C=8, L=1, H=2, d_ff=8)


@pytest.fixture
def evaluation(niels, texts, tmp_path, monkeypatch):
    """Run `niels-gpt evaluate --json` on an untrained model; return the parsed report."""
    monkeypatch.setattr(paths, "REPO_ROOT", tmp_path)
    train = TrainConfig(B=3, eval_steps=2, seed=5)
    state = lively_state(CFG)._replace(train_cfg=train)
    write_checkpoint([tmp_path / "m.pt"], checkpoint_of(state))

    def run(*args):
        result = niels("evaluate", "--ckpt", "m.pt", "--device", "cpu", "--json", *args)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return run


@pytest.fixture
def where(texts):
    return "--wiki", texts / "wiki", "--roam", texts / "notes"


def test_sampled_figures_are_those_of_the_training(evaluation, where, texts, tmp_path):
    found = evaluation(*where)
    assert list(found["sources"]) == ["wiki", "roam", "primer"]
    assert (found["method"], found["seed"], found["eval_steps"]) == ("sampled", 5, 2)
    state = open_checkpoint(tmp_path / "m.pt").state
    stream = (texts / "wiki" / "val.txt").read_bytes()
    assert found["sources"]["wiki"]["nats"] == pytest.approx(evaluate(state, stream, 5), rel=1e-6)
    assert found["sources"]["wiki"]["scored"] == 2 * 3 * 16
    assert found["sources"]["roam"]["origin"] == "notes"
    assert evaluation(*where) == found
    more = evaluation(*where, "--seed", "6", "--steps", "4", "--source", "wiki")
    assert list(more["sources"]) == ["wiki"]
    assert more["sources"]["wiki"]["scored"] == 4 * 3 * 16


def test_full_scores_each_byte_of_a_file_once(evaluation, tmp_path):
    text = bytes(range(256)) + "é\N{SEEDLING}".encode()
    (tmp_path / "my text.bin").write_bytes(text)
    found = evaluation("--text", "my text.bin", "--full", "--stride", "5")
    assert (found["method"], found["stride"]) == ("full", 5)
    (result,) = found["sources"].values()
    state = open_checkpoint(tmp_path / "m.pt").state
    assert result["nats"] == score(full_windows(state, text, stride=5)).nats
    assert (result["scored"], result["nbytes"]) == (len(text), len(text))
    assert evaluation("--text", "my text.bin", "--full")["stride"] == 8


def test_a_file_that_is_not_utf8_is_said_to_be_that(niels, evaluation, tmp_path):
    (tmp_path / "wide.txt").write_text("wide " * 20, encoding="utf-16")
    result = niels("evaluate", "--ckpt", "m.pt", "--device", "cpu", "--text", "wide.txt")
    assert result.exit_code == 0
    assert "note: wide.txt: UTF-16-LE, used as it is: save it as UTF-8" in result.stderr


def test_the_table_is_for_people(niels, evaluation, where):
    result = niels("evaluate", "--ckpt", "m.pt", "--device", "cpu", *where)
    head, columns, *rows = result.stdout.splitlines()
    assert "sampled" in head
    assert columns.split() == ["text", "nats", "std", "err", "bits/byte", "bytes", "scored"]
    assert [row.split()[0] for row in rows] == ["wiki", "roam", "primer"]
    assert all(len(row.split()) == 5 for row in rows)


def test_text_that_the_training_did_not_evaluate_on_is_told(niels, evaluation, where, tmp_path):
    state = open_checkpoint(tmp_path / "m.pt").state
    sources = {"wiki": {"origin": "folder", "bytes": 123, "sha256": "0" * 64}}
    trained_on = {"train": {}, "val": sources}
    write_checkpoint([tmp_path / "m.pt"], checkpoint_of(state, sources=trained_on))
    result = niels("evaluate", "--ckpt", "m.pt", "--device", "cpu", *where, "--json")
    assert "note: wiki: not the text of the run" in result.stderr
    assert "roam: not the text" not in result.stderr
    json.loads(result.stdout)


def test_absent_sources_are_left_out_unless_named(niels, evaluation, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROAM_DIR", tmp_path / "absent")
    where = "--wiki", texts / "wiki"
    result = niels("evaluate", "--ckpt", "m.pt", "--device", "cpu", *where)
    assert result.exit_code == 0
    assert "note: roam: left out (no notes" in result.stderr
    named = niels("evaluate", "--ckpt", "m.pt", "--device", "cpu", *where, "--source", "roam")
    assert named.exit_code == 2
    assert "'roam' cannot be built" in named.stderr
    given = niels("evaluate", "--ckpt", "m.pt", "--device", "cpu", *where, "--roam", "mistyped")
    assert (given.exit_code, given.stdout) == (2, "")
    assert "mistyped: no such folder" in given.stderr


def test_a_full_score_needs_no_window(evaluation, niels, texts, tmp_path):
    wiki = tmp_path / "short"
    wiki.mkdir()
    (wiki / "train.txt").write_text("t")
    (wiki / "val.txt").write_text("five!")
    (tmp_path / "five").write_text("five!")
    of_source = evaluation("--wiki", wiki, "--source", "wiki", "--full")["sources"]["wiki"]
    of_file = evaluation("--text", "five", "--full")["sources"]["five"]
    assert of_source["scored"] == of_file["scored"] == 5
    assert of_source["nats"] == of_file["nats"]
    sampled = niels("evaluate", "--ckpt", "m.pt", "--device", "cpu", "--wiki", wiki)
    assert (sampled.exit_code, sampled.stdout) == (2, "")
    assert "'wiki' cannot be scored: 5 bytes, shorter than T+1=17" in sampled.stderr


def test_a_default_source_too_short_to_score_is_left_out(evaluation, where, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "PRIMER_PATH", tmp_path / "primer.txt")
    (tmp_path / "primer.txt").write_text("user: a\n\n<dialogue>\n\nuser: b\n")
    assert list(evaluation(*where)["sources"]) == ["wiki", "roam"]
    assert list(evaluation(*where, "--full")["sources"]) == ["wiki", "roam", "primer"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--stride", "3"], "--full"),
        (["--full", "--seed", "1"], "--full"),
        (["--text", "a", "--source", "wiki"], "cannot be combined"),
        (["--full", "--stride", "17", "--text", "a"], "stride=17 must be from 1 to T=16"),
        (["--full", "--stride", "0", "--text", "a"], "stride=0 must be"),
        (["--text", "a"], "a: 5 bytes, shorter than T+1=17, the length of a window; use --full"),
        (["--text", "empty"], "empty: the file is empty"),
        (["--text", "absent"], "absent"),
        (["--steps", "0", "--text", "a"], "eval_steps=0"),
    ],
)
def test_what_is_wrong_is_told(niels, evaluation, tmp_path, args, message):
    (tmp_path / "a").write_text("short")
    (tmp_path / "empty").write_text("")
    result = niels("evaluate", "--ckpt", "m.pt", "--device", "cpu", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_checkpoint_is_told(niels):
    result = niels("evaluate", "--ckpt", "absent.pt", "--text", "a")
    assert result.exit_code == 2
    assert "absent.pt" in result.stderr


def test_a_checkpoint_of_another_program_is_evaluated_with_the_defaults(niels, tmp_path):
    payload = payload_of(checkpoint_of(lively_state(CFG)))
    torch.save({**payload, "train_cfg": {"lr": 0.1}, "optimizer_state": None}, tmp_path / "m.pt")
    (tmp_path / "text").write_bytes(bytes(range(100)))
    args = ["evaluate", "--ckpt", "m.pt", "--device", "cpu", "--text", "text", "--steps", "1"]
    result = niels(*args, "--json")
    assert result.exit_code == 0, result.stderr
    assert "note: train_cfg is from another program" in result.stderr
    found = json.loads(result.stdout)
    assert (found["seed"], found["sources"]["text"]["scored"]) == (42, 32 * 16)


def test_a_model_that_does_not_know_all_bytes_is_refused(niels, tmp_path):
    state = lively_state(ModelConfig(V=100, T=16, C=8, L=1, H=2, d_ff=8))
    write_checkpoint([tmp_path / "m.pt"], checkpoint_of(state))
    result = niels("evaluate", "--ckpt", "m.pt", "--device", "cpu", "--text", "m.pt")
    assert result.exit_code == 2
    assert "V" in result.stderr
