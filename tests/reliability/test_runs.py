"""Whole runs under kills and signals: they end in the bits of an uninterrupted run."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from niels_gpt.checkpoint import load_checkpoint
from niels_gpt.run.metrics import CLOCK_FIELDS
from tests import ROOT
from tests.reliability.campaign import tries
from tests.reliability.signalled import PHASES

CONFIG = {
    "model": {"T": 16, "C": 8, "L": 1, "H": 2, "d_ff": 8, "dropout": 0.1},
    "train": {
        "B": 4,
        "total_steps": 12,
        "eval_every": 4,
        "eval_steps": 3,
        "ckpt_every": 3,
        "log_every": 1,
        "warmup_steps": 2,
    },
}


class Runner:
    """Starts `train` on one config and text; `folder` is where a run saves."""

    def __init__(self, root: Path, texts: Path) -> None:
        self.root = root
        self.config = root / "config.json"
        self.config.write_text(json.dumps(CONFIG))
        self.args = ["train", "--config", self.config, "--device", "cpu"]
        self.args += ["--wiki", texts / "wiki", "--roam", texts / "notes"]

    def start(
        self,
        folder: Path,
        *more: object,
        program: tuple[object, ...] = ("niels_gpt",),
        threads: int = 1,
    ):
        resume = ["--resume", "latest"] if any(folder.glob("*.pt")) else []
        command = [sys.executable, "-m", *program, *self.args, "--out", folder, *resume, *more]
        return subprocess.Popen(
            [*map(str, command)],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, folder: Path, *more: object, **how) -> tuple[int, str]:
        with self.start(folder, *more, **how) as process:
            out, err = process.communicate(timeout=300)
        return process.returncode, out + err

    def finish_signalled(self, folder: Path, phase: str, nth: int, *numbers: int):
        signals = ",".join(str(int(n)) for n in numbers)
        return self.finish(folder, program=("tests.reliability.signalled", phase, nth, signals))


@pytest.fixture(scope="module")
def runner(tmp_path_factory, texts):
    return Runner(tmp_path_factory.mktemp("runs"), texts)


@pytest.fixture(scope="module")
def whole(runner):
    """The files of an uninterrupted run."""
    folder = runner.root / "whole"
    code, told = runner.finish(folder)
    assert code == 0, told
    return left(folder)


def left(folder: Path) -> dict[str, object]:
    """Return a run's checkpoints, byte for byte, and its numbers without the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [
        {k: v for k, v in json.loads(line).items() if k not in CLOCK_FIELDS} for line in lines
    ]
    return {"records": records, **{p.name: p.read_bytes() for p in folder.glob("*.pt")}}


@tries(few=range(1), many=range(20))
def test_chains_of_kills_end_in_the_same_bits(runner, whole, tmp_path, tries):
    for seed in tries:
        folder, draw = tmp_path / f"chain-{seed}", random.Random(seed)
        kills = 0
        while True:
            patience = draw.randrange(8, 22)  # lines to read before the kill
            with runner.start(folder) as process:
                lines = [text for _, text in zip(range(patience), process.stdout, strict=False)]
                process.kill()
                process.communicate(timeout=300)
            if any(text.startswith("finished") for text in lines):
                break
            assert process.returncode == -signal.SIGKILL, lines
            kills += 1
            assert kills < 100
        code, told = runner.finish(folder)
        assert code == 0, told
        assert left(folder) == whole, f"seed {seed}, {kills} kills"


@pytest.mark.parametrize(
    "how", ["--no-compile", pytest.param("--compile", marks=pytest.mark.reliability)]
)
def test_several_threads_end_in_the_same_bits(runner, tmp_path, how):
    """On a model large enough for its operations to be shared by the threads."""
    sizes = {"T": 64, "C": 64, "d_ff": 256}
    larger = [part for key, n in sizes.items() for part in ("--set", f"model.{key}={n}")]
    folders = tmp_path / "whole", tmp_path / "resumed"
    code, told = runner.finish(folders[0], *larger, how, threads=4)
    assert code == 0, told
    from_step = ["--resume", folders[0] / "step_0000003.pt"]
    code, told = runner.finish(folders[1], *larger, *from_step, threads=4)
    assert code == 0, told
    whole, resumed = ((folder / "latest.pt").read_bytes() for folder in folders)
    assert whole == resumed


MIXES = [
    (signal.SIGHUP, signal.SIGHUP),
    (signal.SIGHUP, signal.SIGTERM, signal.SIGINT),
    (signal.SIGINT, signal.SIGINT, signal.SIGHUP),
    (signal.SIGTERM, 0, signal.SIGTERM, signal.SIGHUP),  # 0: after a pause
]


def campaign(*phases):
    return [pytest.param(*phase, marks=pytest.mark.reliability) for phase in phases]


@pytest.mark.parametrize(
    ("phase", "nth", "number"),
    [
        ("evaluation", 2, signal.SIGINT),
        ("step", 3, signal.SIGTERM),
        *campaign(*(("evaluation", nth, signal.SIGHUP) for nth in range(1, 9))),
        *campaign(*(("step", nth, signal.SIGINT) for nth in range(1, 12))),
        *campaign(*(("save", nth, signal.SIGTERM) for nth in range(1, 10))),
        *campaign(*(("metrics", nth, signal.SIGHUP) for nth in range(1, 10))),
    ],
)
def test_a_signal_in_any_phase_saves_and_the_resume_is_exact(
    runner, whole, tmp_path, phase, nth, number
):
    folder = tmp_path / "out"
    code, told = runner.finish_signalled(folder, phase, nth, number)
    assert code == 128 + number, told
    assert "Traceback" not in told
    load_checkpoint(folder / "latest.pt", device="cpu")
    code, told = runner.finish(folder)
    assert code == 0, told
    assert left(folder) == whole


def test_a_signal_while_the_text_is_loaded_ends_at_once(runner, tmp_path):
    code, told = runner.finish_signalled(tmp_path / "out", "loading", 1, signal.SIGTERM)
    assert code == 143
    assert "nothing to save" in told
    assert not any((tmp_path / "out").glob("*.pt"))


@pytest.mark.parametrize(
    ("phase", "mix"),
    [
        ("save", (signal.SIGHUP, signal.SIGHUP)),
        *campaign(*((phase, mix) for phase in PHASES if phase != "loading" for mix in MIXES)),
    ],
)
def test_signals_that_no_person_repeats_save_and_the_resume_is_exact(
    runner, whole, tmp_path, phase, mix
):
    folder = tmp_path / "out"
    code, told = runner.finish_signalled(folder, phase, 3, *mix)
    assert code == 128 + mix[0], told
    assert f"stopped by {signal.Signals(mix[0]).name}; last good checkpoint" in told
    load_checkpoint(folder / "latest.pt", device="cpu")
    code, told = runner.finish(folder)
    assert code == 0, told
    assert left(folder) == whole


def test_a_second_ctrl_c_ends_at_once_and_leaves_whole_files(runner, whole, tmp_path):
    folder, pause = tmp_path / "out", 0
    code, told = runner.finish_signalled(folder, "save", 3, signal.SIGTERM, pause, signal.SIGINT)
    assert code == 130, told
    assert "stopped by" not in told
    for file in folder.glob("*.pt"):
        load_checkpoint(file, device="cpu")
    code, told = runner.finish(folder)
    assert code == 0, told
    assert left(folder) == whole


def test_two_runs_in_one_folder_the_second_is_refused(runner, tmp_path):
    folder = tmp_path / "out"
    with runner.start(folder, "--set", "train.total_steps=100000000") as first:
        next(first.stdout)
        code, told = runner.finish(folder)
        first.terminate()
        first.communicate(timeout=300)
    assert code == 2
    assert str(first.pid) in told
    assert first.returncode == 143
