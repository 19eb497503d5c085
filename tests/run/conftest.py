"""The `train` command in this process, on a tiny config and generated text."""

import json

import pytest

TINY = {
    "model": {"T": 16, "C": 8, "L": 1, "H": 2, "d_ff": 8, "dropout": 0.1},
    "train": {
        "B": 4,
        "total_steps": 8,
        "eval_every": 2,
        "eval_steps": 1,
        "ckpt_every": 1,
        "log_every": 1,
        "warmup_steps": 0,
    },
}


@pytest.fixture
def train(niels, texts, tmp_path):
    """Run `niels-gpt train ARGS`; a change of the config is given as `total_steps=4`."""
    (tmp_path / "c.json").write_text(json.dumps(TINY))

    def run(*args, wiki=None, **changes):
        where = ["--wiki", wiki or texts / "wiki", "--roam", texts / "notes"]
        sets = [word for k, v in changes.items() for word in ("--set", f"train.{k}={v}")]
        return niels("train", "--config", "c.json", "--device", "cpu", *where, *sets, *args)

    return run


@pytest.fixture
def other_wiki(texts, tmp_path):
    """A wiki whose validation text alone is another one."""
    folder = tmp_path / "other"
    folder.mkdir()
    text = (texts / "wiki" / "val.txt").read_text()
    (folder / "val.txt").write_text(text + "More.")
    (folder / "train.txt").write_text((texts / "wiki" / "train.txt").read_text())
    return folder
