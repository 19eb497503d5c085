"""A resume without a config: what it finds in the checkpoint and beside it."""

import json
import shutil

import pytest
import torch

from niels_gpt.checkpoint import open_checkpoint
from niels_gpt.config import ModelConfig, TrainConfig, to_dict
from niels_gpt.run.call import Call, read_call
from niels_gpt.state import make_state, to_modules
from tests.run.conftest import TINY


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.pt")}


@pytest.fixture
def half(train, niels, tmp_path):
    """Return whole's bytes, with a folder `half` that has only the first four steps of it."""
    train("--out", "whole", "--set", "model.dropout=0.2", base_lr=0.01)
    whole = contents(tmp_path / "whole")
    (tmp_path / "half").mkdir()
    for name in ("step_0000004.pt", "metrics.jsonl", ".run.json"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "half" / name)
    return whole


def test_a_resume_needs_nothing_but_the_checkpoint(niels, half, tmp_path):
    (tmp_path / "c.json").unlink()
    result = niels("train", "--resume", "half/step_0000004.pt")
    assert result.exit_code == 0, result.output
    found = contents(tmp_path / "half")
    assert found == {name: data for name, data in half.items() if name in found}
    assert open_checkpoint(tmp_path / "half" / "latest.pt").step == 8
    assert "in the checkpoint, now" not in result.stderr


def test_latest_needs_no_config_either(niels, half, tmp_path):
    result = niels("train", "--resume", "latest", "--out", "half")
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "half")["latest.pt"] == half["latest.pt"]


def test_what_is_given_anew_is_shown_against_the_checkpoint(niels, half, other_wiki, tmp_path):
    more = ["--set", "train.base_lr=0.02", "--out", "b"]
    result = niels("train", "--resume", "half/step_0000004.pt", *more)
    assert result.exit_code == 0, result.output
    assert "note: train.base_lr: 0.01 in the checkpoint, now 0.02" in result.stderr
    assert open_checkpoint(tmp_path / "b" / "latest.pt").train_cfg["base_lr"] == 0.02
    refused = niels("train", "--resume", "b/latest.pt", "--wiki", other_wiki)
    assert refused.exit_code == 2
    assert "val/wiki: " in refused.stderr
    changed = niels("train", "--resume", "b/latest.pt", "--set", "model.dropout=0")
    assert changed.exit_code == 2
    assert "dropout: checkpoint 0.2, config 0.0" in changed.stderr


def test_a_config_that_is_given_counts_and_is_compared(niels, half, tmp_path):
    config = {**TINY, "model": {**TINY["model"], "dropout": 0.2}}
    (tmp_path / "c.json").write_text(json.dumps(config))
    result = niels("train", "--resume", "half/step_0000004.pt", "--config", "c.json")
    assert result.exit_code == 0, result.output
    assert "note: train.base_lr: 0.01 in the checkpoint, now 0.0003" in result.stderr


def test_without_a_config_only_a_resume_can_begin(niels, half):
    for args in ([], ["--from", "whole/latest.pt"]):
        result = niels("train", *args)
        assert result.exit_code == 2
        assert "Missing option '--config'" in result.stderr


def test_a_text_that_is_gone_is_named(niels, half, texts, tmp_path):
    call, _ = read_call(tmp_path / "half")
    gone = Call(call.config, {**call.places, "wiki": [str(tmp_path / "gone")]})
    gone.write(tmp_path / "half")
    result = niels("train", "--resume", "half/step_0000004.pt")
    assert result.exit_code == 2
    assert f"{tmp_path / 'gone'}, where this run had its text (wiki), does" in result.stderr
    assert "--wiki" in result.stderr
    given = niels("train", "--resume", "half/step_0000004.pt", "--wiki", texts / "wiki")
    assert given.exit_code == 0, given.output
    assert read_call(tmp_path / "half") == (call, [])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", True),
        ("[]", False),
        ("{", True),
        ('{"places": 3}', False),
        ('{"places": {"wiki": "x", "moon": ["x"]}}', False),
        ("\0", True),
    ],
)
def test_a_damaged_file_is_no_call(tmp_path, text, told):
    (tmp_path / ".run.json").write_text(text)
    call, messages = read_call(tmp_path)
    assert call == Call()
    assert [str(tmp_path) in message for message in messages] == [True] * told


def test_a_run_whose_call_is_damaged_asks_for_its_text(niels, half, tmp_path):
    (tmp_path / "half" / ".run.json").write_text("{")
    result = niels("train", "--resume", "half/step_0000004.pt")
    assert result.exit_code == 2  # the default wiki is another text
    assert "the text differs" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_call_goes_with_its_run(train, tmp_path):
    train("--out", "a", total_steps=2)
    call = (tmp_path / "a" / ".run.json").read_bytes()
    train("--out", "a", total_steps=3)
    assert (tmp_path / "a" / "earlier-001" / ".run.json").read_bytes() == call


def test_a_config_of_another_program_is_asked_for(train, niels, tmp_path):
    model, optimizer = to_modules(make_state(ModelConfig(**TINY["model"]), TrainConfig()))
    payload = {
        "model_cfg": to_dict(ModelConfig(**TINY["model"])),
        "train_cfg": {"steps": 5},
        "model_state": model.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "step": 0,
        "best_val_loss": None,
    }
    torch.save(payload, tmp_path / "plain.pt")
    result = niels("train", "--resume", "plain.pt")
    assert result.exit_code == 2
    assert "unknown key train.steps" in result.stderr
    assert "--config FILE" in result.stderr
    assert train("--resume", "plain.pt", "--out", "b").exit_code == 0
