"""The example of data-parallel training, in two real processes."""

import json
import subprocess
import sys
from functools import cache

import pytest

from niels_gpt.analysis.replay import differences
from niels_gpt.checkpoint import load_checkpoint, open_checkpoint
from niels_gpt.config import OPTIMIZERS
from niels_gpt.schema import write_payload
from tests import ROOT

EXAMPLE = ROOT / "examples" / "data_parallel.py"
CONFIG = {
    "model": {"T": 16, "C": 16, "L": 2, "H": 2, "d_ff": 16, "dropout": 0.1},
    "train": {
        "B": 6,
        "total_steps": 10,
        "eval_every": 5,
        "eval_steps": 1,
        "ckpt_every": 5,
        "warmup_steps": 2,
        "base_lr": 0.01,
    },
}
ROUNDING = 2e-5  # ten updates of up to 0.01 each


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, texts):
    config = tmp_path_factory.mktemp("parallel") / "config.json"
    config.write_text(json.dumps(CONFIG))
    where = ["--wiki", texts / "wiki", "--roam", texts / "notes"]
    return ["--config", config, *where]


@pytest.fixture(scope="module")
def on_two(arguments):
    """Run the example on two processes."""

    def run(*more):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [sys.executable, *launcher, EXAMPLE, *arguments, *more]
        return subprocess.run(
            [*map(str, command)], capture_output=True, text=True, timeout=240, check=False
        )

    return run


@pytest.fixture
def on_one(niels, arguments):
    """Run the trainer itself."""
    return lambda *more: niels("train", *arguments, "--device", "cpu", *more)


@pytest.fixture(scope="module")
def two_under(on_two, tmp_path_factory):
    """Return the folder of a run on two processes under an optimizer."""

    @cache
    def run(optimizer):
        out = tmp_path_factory.mktemp("two") / "out"
        result = on_two("--out", out, "--set", f"train.optimizer={optimizer}")
        assert result.returncode == 0, result.stderr
        return out

    return run


@pytest.fixture
def two(two_under):
    return two_under("adamw")


def largest_difference(a, b):
    a, b = (open_checkpoint(path).state for path in (a, b))
    assert a.step == b.step
    return max([d.size for d in differences(a, b) if d.tensor.startswith("params")], default=0.0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_processes_train_what_one_does(two_under, on_one, tmp_path, optimizer):
    two = two_under(optimizer)
    result = on_one("--out", tmp_path / "one", "--set", f"train.optimizer={optimizer}")
    assert result.exit_code == 0, result.output
    names = sorted(p.name for p in tmp_path.joinpath("one").glob("[!.]*"))
    assert sorted(p.name for p in two.glob("[!.]*")) == names
    assert largest_difference(two / "latest.pt", tmp_path / "one" / "latest.pt") < ROUNDING
    one, other = (load_checkpoint(f / "best.pt", device="cpu") for f in (two, tmp_path / "one"))
    assert one.keys() == other.keys()
    assert one["sources"] == other["sources"]
    assert abs(one["best_val_loss"] - other["best_val_loss"]) < ROUNDING


def test_one_process_resumes_what_two_saved(two, on_one, tmp_path):
    result = on_one("--out", tmp_path / "out", "--resume", two / "step_0000005.pt")
    assert result.exit_code == 0, result.output
    assert largest_difference(two / "latest.pt", tmp_path / "out" / "latest.pt") < ROUNDING


def test_two_processes_resume_what_one_saved(two, on_one, on_two, tmp_path):
    result = on_one("--out", tmp_path, "--set", "train.total_steps=10")
    assert result.exit_code == 0, result.output
    for name in ("step_0000010.pt", "latest.pt", "best.pt"):
        (tmp_path / name).unlink()
    parallel = on_two("--out", tmp_path, "--resume", tmp_path / "step_0000005.pt")
    assert parallel.returncode == 0, parallel.stderr
    assert largest_difference(two / "latest.pt", tmp_path / "latest.pt") < ROUNDING


def test_the_text_is_named_and_what_is_saved_is_not_said_to_be_compiled(two, on_two, tmp_path):
    payload = load_checkpoint(two / "latest.pt", device="cpu")
    write_payload(
        [tmp_path / "latest.pt"],
        {**payload, "step": 9, "environment": {**payload["environment"], "compile": True}},
    )
    result = on_two("--out", tmp_path, "--resume", tmp_path / "latest.pt")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("train/wiki: folder, ") == 1
    saved = load_checkpoint(tmp_path / "latest.pt", device="cpu")
    assert (saved["step"], saved["environment"]["compile"]) == (10, False)


def test_a_mistake_is_one_message(tmp_path):
    command = [sys.executable, EXAMPLE, "--config", "nowhere", "--out", tmp_path]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr
