"""The `train` command, in processes of its own, as users run it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from niels_gpt import ModelConfig, TrainConfig, paths, streams, to_modules
from niels_gpt.checkpoint import load_checkpoint, open_checkpoint
from niels_gpt.files.torchfile import read_torch_file
from niels_gpt.run.metrics import CLOCK_FIELDS
from niels_gpt.schema import write_payload
from niels_gpt.train import main
from tests import ROOT, SHARED

TINY = {
    "model": {"T": 16, "C": 8, "L": 1, "H": 2, "d_ff": 8, "dropout": 0.1},
    "train": {
        "B": 4,
        "total_steps": 7,
        "eval_every": 3,
        "eval_steps": 2,
        "ckpt_every": 2,
        "log_every": 2,
        "warmup_steps": 2,
    },
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture
def train(niels, config, texts):
    """Run `niels-gpt train` in this process on the tiny config and the generated texts."""

    def run(*args, wiki=None, roam=texts / "notes"):
        where = ["--wiki", wiki or texts / "wiki", *(["--roam", roam] if roam else [])]
        return niels("train", "--config", config, "--device", "cpu", *where, *args)

    return run


def names(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK_FIELDS} for line in lines]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.pt")}


def log_lines(result):
    """Return step, loss and learning rate of each line about a training step."""
    form = r"step +(\d+)/7  loss (\d\.\d{4})  lr (\d\.\d{3}e[-+]\d\d)  [\d,]+ bytes/s"
    lines = [line for line in result.stdout.splitlines() if "/7  loss" in line]
    return [re.fullmatch(form, line).groups() for line in lines]


def test_a_run_leaves_its_checkpoints_and_its_numbers(train, tmp_path):
    result = train("--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert names(tmp_path / "out") == [
        "best.pt",
        "latest.pt",
        "metrics.jsonl",
        "step_0000002.pt",
        "step_0000004.pt",
        "step_0000006.pt",
    ]
    records = metrics(tmp_path / "out")
    assert [(r["kind"], r["step"]) for r in records] == [
        ("train", 1),
        ("train", 2),
        ("eval", 3),
        ("train", 4),
        ("train", 6),
        ("eval", 6),
        ("train", 7),
        ("eval", 7),
    ]
    assert records[0]["lr"] == 0.0
    assert log_lines(result) == [
        (str(r["step"]), f"{r['loss']:.4f}", f"{r['lr']:.3e}")
        for r in records
        if r["kind"] == "train"
    ]
    latest = load_checkpoint(tmp_path / "out" / "latest.pt", device="cpu")
    evals = {r["step"]: r["val_wiki_loss"] for r in records if r["kind"] == "eval"}
    assert latest["best_val_loss"] == min(evals.values())
    assert latest["step"] == 7
    best = load_checkpoint(tmp_path / "out" / "best.pt", device="cpu")
    assert evals[best["step"]] == min(evals.values())
    for word in ("train/wiki", "val/wiki", "sha256", "loss", "lr", "bytes/s", "--resume"):
        assert word in result.stdout


def test_the_recorded_validation_loss_is_that_of_the_module_in_the_checkpoint(
    train, tmp_path, texts
):
    from niels_gpt.eval import eval_loss_on_stream

    train("--out", tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out" / "latest.pt")
    model, _ = to_modules(checkpoint.state)
    stream = (texts / "wiki" / "val.txt").read_bytes()
    loss = eval_loss_on_stream(
        model,
        stream=stream,
        B=4,
        T=16,
        device="cpu",
        eval_steps=2,
        seed=checkpoint.state.train_cfg.seed,
    )
    assert loss == checkpoint.scores.val_loss


def test_same_config_same_bytes(train, tmp_path):
    first = train("--out", tmp_path / "a")
    second = train("--out", tmp_path / "b", "--set", "train.log_every=2")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert log_lines(first) == log_lines(second)


MUON = ("--set", "train.optimizer=muon", "--set", "train.init=fan_in")


@pytest.mark.parametrize("more", [(), MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("name", ["step_0000002.pt", "step_0000004.pt", "best.pt", "latest.pt"])
def test_a_resume_from_any_checkpoint_ends_in_the_same_bytes(train, tmp_path, name, more):
    train("--out", tmp_path / "whole", *more)
    whole = contents(tmp_path / "whole"), metrics(tmp_path / "whole")
    result = train("--resume", tmp_path / "whole" / name, *more)
    assert result.exit_code == 0, result.stderr
    assert (contents(tmp_path / "whole"), metrics(tmp_path / "whole")) == whole


def test_a_resume_from_an_earlier_step_moves_later_files_aside(train, tmp_path):
    out = tmp_path / "out"
    train("--out", out)
    before = contents(out)
    result = train("--resume", out / "step_0000004.pt", "--set", "train.base_lr=0.01")
    assert result.exit_code == 0, result.stderr
    aside = out / "earlier-001"
    assert str(aside) in result.stdout
    moved = contents(aside)
    assert {"latest.pt", "step_0000006.pt"} <= moved.keys()
    assert "step_0000004.pt" not in moved
    assert all(before[n] == data for n, data in moved.items())
    assert "train.base_lr: 0.0003 in the checkpoint, now 0.01" in result.stderr
    assert contents(out)["latest.pt"] != before["latest.pt"]


def test_a_fresh_run_moves_an_earlier_one_aside_and_nothing_else(train, tmp_path):
    out = tmp_path / "out"
    train("--out", out)
    (out / "mine.pt").write_bytes(b"not a file of this program")
    (out / "notes.txt").write_text("mine")
    before = contents(out) | {n: (out / n).read_bytes() for n in ("metrics.jsonl", ".run.json")}
    del before["mine.pt"]
    result = train("--out", out, "--set", "train.seed=1")
    assert str(out / "earlier-001") in result.stdout
    assert {p.name: p.read_bytes() for p in (out / "earlier-001").iterdir()} == before
    assert (out / "mine.pt").exists()
    assert (out / "notes.txt").exists()


def test_a_resume_into_another_folder_moves_aside_all_that_another_run_left_there(train, tmp_path):
    train("--out", tmp_path / "a")
    train("--out", tmp_path / "b", "--set", "train.seed=1")
    before = contents(tmp_path / "b")
    numbers = (tmp_path / "b" / "metrics.jsonl").read_bytes()
    result = train("--resume", tmp_path / "a" / "step_0000006.pt", "--out", tmp_path / "b")
    assert result.exit_code == 0, result.stderr
    assert contents(tmp_path / "b" / "earlier-001") == before
    assert (tmp_path / "b" / "earlier-001" / "metrics.jsonl").read_bytes() == numbers
    whole = contents(tmp_path / "a")
    assert all(whole[name] == data for name, data in contents(tmp_path / "b").items())


def test_a_link_to_nowhere_in_the_place_of_a_checkpoint_moves_aside(train, tmp_path):
    out = tmp_path / "out"
    train("--out", out)
    whole = contents(out)
    (out / "latest.pt").unlink()
    (out / "latest.pt").symlink_to("nowhere")
    result = train("--resume", out / "step_0000004.pt")
    assert result.exit_code == 0, result.stderr
    assert contents(out) == whole


def test_metrics_that_another_program_wrote_are_left_out_where_they_are_no_records(train, tmp_path):
    out = tmp_path / "out"
    train("--out", out)
    before, log = metrics(out), out / "metrics.jsonl"
    log.write_text('{"kind": [], "step": 1, "seconds": "x"}\n' + log.read_text())
    result = train("--resume", out / "step_0000004.pt")
    assert result.exit_code == 0, result.stderr
    assert f"{log}: skipped what is not a record, in line 1" in result.stderr
    assert metrics(out) == before


def test_resume_latest_takes_the_newest_good_one_and_says_what_it_skipped(train, tmp_path):
    out = tmp_path / "out"
    train("--out", out)
    whole = contents(out)
    for name in ("latest.pt", "best.pt", "step_0000006.pt"):
        data = bytearray(whole[name])
        data[data.index(b"digest")] ^= 1
        (out / name).write_bytes(data)
    result = train("--resume", "latest", "--out", out)
    assert result.exit_code == 0, result.stderr
    assert f"{out / 'latest.pt'}: skipped" in result.stderr
    assert contents(out) == whole


def test_a_resume_reads_its_checkpoint_once(train, tmp_path, monkeypatch):
    train("--out", tmp_path / "out")
    reads = []

    def read(path):
        reads.append(path.name)
        return read_torch_file(path)

    monkeypatch.setattr("niels_gpt.schema.read_torch_file", read)
    more = ["--set", "train.total_steps=8"]
    assert train("--resume", "latest", "--out", tmp_path / "out", *more).exit_code == 0
    assert reads.count("latest.pt") == 1


@pytest.mark.parametrize("out", ["out", "."])
def test_a_checkpoint_of_an_imperative_loop_resumes(train, tmp_path, out):
    """Its best validation loss counts where its best.pt is, of a step that it does not say."""
    from niels_gpt import make_state
    from niels_gpt.config import to_dict

    model_cfg, train_cfg = ModelConfig(**TINY["model"]), TrainConfig(**TINY["train"])
    model, optimizer = to_modules(make_state(model_cfg, train_cfg))
    x = torch.zeros(2, 16, dtype=torch.int64)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    payload = {
        "model_cfg": to_dict(model_cfg),
        "train_cfg": to_dict(train_cfg),
        "model_state": model.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "step": 3,
        "best_val_loss": 2.0,
    }
    for name in ("plain.pt", "best.pt"):
        torch.save(payload, tmp_path / name)
    result = train("--resume", tmp_path / "plain.pt", "--out", tmp_path / out)
    assert result.exit_code == 0, result.stderr
    assert "not bit-exact" in result.stderr
    assert ("best 2.0000 before this run" in result.stdout) == (out == ".")
    assert ("(2.0000 nats): it starts anew" in result.stderr) == (out != ".")
    latest, best = (
        load_checkpoint(tmp_path / out / name, device="cpu") for name in ("latest.pt", "best.pt")
    )
    assert latest["step"] == 7
    assert latest["best_val_loss"] == best["best_val_loss"]


def test_resuming_on_other_text_is_refused_unless_allowed(train, tmp_path, texts):
    out, other = tmp_path / "out", tmp_path / "other"
    train("--out", out, "--set", "train.total_steps=2")
    other.mkdir()
    (other / "train.txt").write_text((texts / "wiki" / "train.txt").read_text() + "More.")
    (other / "val.txt").write_text((texts / "wiki" / "val.txt").read_text())
    before = contents(out)
    refused = train("--resume", out / "latest.pt", wiki=other)
    assert refused.exit_code == 2
    assert "train/wiki" in refused.stderr
    assert "--allow-data-change" in refused.stderr
    assert contents(out) == before
    allowed = train("--resume", out / "latest.pt", "--allow-data-change", wiki=other)
    assert allowed.exit_code == 0, allowed.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--set", "model.H=3"], ["H=3", "C=8"]),
        (["--set", "train.totl_steps=1"], ["totl_steps", "total_steps"]),
        (["--set", "model.T=true"], ["model.T", "true"]),
        (["--set", "train.optimizer=moun"], ["train.optimizer", "moun", "did you mean muon?"]),
        (["--set", "train.min_lr=1"], ["min_lr", "base_lr"]),
        (["--set", 'train.p_train={"wiki":0.5}'], ["p_train", "0.5"]),
        (["--set", "model.T=100000"], ["too short", "100000"]),
        (["--resume", "missing.pt"], ["missing.pt"]),
        (["--resume", "latest", "--out", "nowhere"], ["nowhere"]),
        (["--device", "toaster"], ["toaster"]),
        (["--wiki", "missing"], ["missing"]),
        (["--roam", "missing"], ["--notes missing: no such folder"]),
        (["--primer", "missing"], ["--primer missing: no such file"]),
        (["--resume", "."], ["--resume .: is a folder", "--resume latest --out ."]),
        (["--config", "missing.json"], ["missing.json"]),
        (["--out", "tiny.json"], ["tiny.json"]),
        (["--unknown"], ["--unknown"]),
    ],
)
def test_what_is_wrong_before_the_first_step_exits_2_with_one_message(train, tmp_path, args, words):
    (tmp_path / "out").mkdir()
    before = sorted(tmp_path.rglob("*"))
    result = train(*(["--out", tmp_path / "out"] if "--out" not in args else []), *args)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert [p for p in sorted(tmp_path.rglob("*")) if not p.name.startswith(".")] == before


def test_a_model_of_another_shape_is_refused_with_a_line_per_field(train, tmp_path):
    train("--out", tmp_path / "out", "--set", "train.total_steps=1")
    result = train("--resume", tmp_path / "out" / "latest.pt", "--set", "model.d_ff=16")
    assert result.exit_code == 2
    assert "d_ff" in result.stderr
    assert "16" in result.stderr


@pytest.mark.parametrize(("first", "then"), [((), MUON), (MUON, ())], ids=["muon", "adamw"])
def test_a_resume_under_another_optimizer_is_refused_with_both_names(train, tmp_path, first, then):
    train("--out", tmp_path / "out", "--set", "train.total_steps=1", *first)
    before = contents(tmp_path / "out")
    result = train("--resume", tmp_path / "out" / "latest.pt", *then)
    assert result.exit_code == 2
    assert "adamw" in result.stderr
    assert "muon" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert contents(tmp_path / "out") == before


@pytest.fixture
def of_an_older_version(train, tmp_path):
    """A checkpoint whose config lacks the keys that were added later, of a run that went on."""
    train("--out", tmp_path / "out")
    path = tmp_path / "out" / "step_0000004.pt"
    payload = load_checkpoint(path, device="cpu")
    for key in ("optimizer", "init", "lr_decay"):
        del payload["train_cfg"][key]
    write_payload([path], payload)
    return path


def test_a_checkpoint_of_an_older_version_resumes_exactly(train, of_an_older_version):
    path = of_an_older_version
    whole = contents(path.parent)
    result = train("--resume", path)
    assert result.exit_code == 0, result.stderr
    assert "in the checkpoint, now" not in result.stderr
    assert contents(path.parent) == whole


def test_what_an_older_version_could_not_say_is_the_default(train, of_an_older_version):
    result = train("--resume", of_an_older_version, "--set", "train.lr_decay=linear")
    assert result.exit_code == 0, result.stderr
    assert "train.lr_decay: 'cosine' in the checkpoint, now 'linear'" in result.stderr


def test_a_second_run_in_the_same_folder_is_refused_with_the_pid_of_the_first(train, tmp_path):
    from niels_gpt.files.durable import lock_folder

    (tmp_path / "out").mkdir()
    with lock_folder(tmp_path / "out"):
        result = train("--out", tmp_path / "out")
    assert result.exit_code == 2
    assert str(os.getpid()) in result.stderr
    assert train("--out", tmp_path / "out").exit_code == 0


def test_notes_that_are_absent_are_left_out_and_that_is_said(train, tmp_path, monkeypatch):
    (tmp_path / "no-notes").mkdir()
    monkeypatch.setattr(paths, "ROAM_DIR", tmp_path / "no-notes")
    result = train("--out", tmp_path / "out", roam=None)
    assert result.exit_code == 0, result.stderr
    assert "roam: left out" in result.stderr
    sources = load_checkpoint(tmp_path / "out" / "latest.pt", device="cpu")["sources"]
    assert sorted(sources["train"]) == ["primer", "wiki"]


@pytest.mark.parametrize(
    ("number", "more"),
    [(signal.SIGINT, ()), (signal.SIGTERM, MUON)],
)
def test_a_signal_saves_and_exits_with_its_code_and_the_resume_is_exact(
    train, config, texts, tmp_path, number, more
):
    train("--out", tmp_path / "whole", *more)
    command = [sys.executable, "-m", "tests.reliability.signalled", "step", "3", int(number)]
    command += ["train", "--config", config, "--device", "cpu", "--out", tmp_path / "out"]
    command += ["--wiki", texts / "wiki", "--roam", texts / "notes", *more]
    process = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HOME": str(tmp_path)},
        timeout=120,
    )
    err = process.stderr
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    stopped = load_checkpoint(tmp_path / "out" / "latest.pt", device="cpu")
    assert 1 <= stopped["step"] < 7
    assert train("--resume", tmp_path / "out" / "latest.pt", *more).exit_code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")


def test_a_reader_that_goes_away_does_not_end_the_training(config, texts, tmp_path):
    command = (
        f"{sys.executable} -m niels_gpt train --config {config} --wiki {texts}/wiki --device cpu "
        f"--roam {texts}/notes --out {tmp_path}/out | head -n 1; exit ${{PIPESTATUS[0]}}"
    )
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Error") == 0
    assert load_checkpoint(tmp_path / "out" / "latest.pt", device="cpu")["step"] == 7


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_streams_that_are_closed_from_the_start_do_not_end_the_training(
    config, texts, tmp_path, closed
):
    command = (
        f"{sys.executable} -m niels_gpt train --config {config} --wiki {texts}/wiki --device cpu "
        f"--roam {texts}/notes --out {tmp_path}/out {closed}"
    )
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, timeout=120)
    assert result.returncode == 0
    assert load_checkpoint(tmp_path / "out" / "latest.pt", device="cpu")["step"] == 7


def test_a_name_that_the_streams_encoding_lacks_does_not_silence_it(niels_process, config, texts):
    where = ["--wiki", texts / "wiki", "--roam", texts / "notes", "--out", "\N{SEEDLING}"]
    args = ["train", "--config", config, "--device", "cpu", *where]
    result = niels_process(*args, PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert "files: ?\n" in result.stdout
    assert "--resume '?/latest.pt'" in result.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full: Linux")
def test_a_full_disk_behind_the_log_does_not_end_the_training(config, texts, tmp_path):
    command = (
        f"{sys.executable} -m niels_gpt train --config {config} --wiki {texts}/wiki --device cpu "
        f"--roam {texts}/notes --out {tmp_path}/out > /dev/full"
    )
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert load_checkpoint(tmp_path / "out" / "latest.pt", device="cpu")["step"] == 7


def test_a_dry_run_writes_nothing(train, tmp_path, monkeypatch):
    monkeypatch.setattr("niels_gpt.paths.REPO_ROOT", tmp_path)  # where the cache would be
    before = sorted(tmp_path.rglob("*"))
    result = train("--out", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "parameters" in result.stdout
    found = json.loads(train("--out", tmp_path / "out", "--dry-run", "--json").stdout)
    assert found["sources"]["train"]["wiki"]["bytes"] > 0
    assert found["seconds_per_step"] > 0
    assert sorted(tmp_path.rglob("*")) == before


def test_json_without_a_dry_run_is_refused(train, tmp_path):
    result = train("--out", tmp_path / "out", "--json")
    assert result.exit_code == 2
    assert "--json requires --dry-run" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["tiny.json", "tiny.json/out", "locked/out"])
def test_a_dry_run_refuses_a_folder_that_the_run_could_not_use(train, tmp_path, monkeypatch, out):
    (tmp_path / "locked").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    result = train("--out", tmp_path / out, "--dry-run")
    monkeypatch.setattr(os, "access", access)
    assert result.exit_code == 2
    assert str(tmp_path / out.split("/")[0]) in result.stderr


def test_what_goes_wrong_in_a_dry_run_is_told_in_one_message(train, monkeypatch):
    def fail(plan):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr("niels_gpt.run.dry_run.estimate", fail)
    result = train("--dry-run")
    assert (result.exit_code, result.stderr) == (2, "error: not enough memory\n")


def test_a_signal_ends_a_dry_run_at_once(train, monkeypatch):
    def stay(plan):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("went on")

    monkeypatch.setattr("niels_gpt.run.dry_run.estimate", stay)
    result = train("--dry-run")
    assert result.exit_code == 143
    assert "nothing to save" in result.stderr


def test_the_command_runs_in_process_and_finds_its_sources_at_call_time(
    config, tmp_path, monkeypatch
):
    text = {"wiki": bytes(range(256))}
    monkeypatch.setattr(streams, "build_sources", lambda cfg=None: (text, text))
    monkeypatch.setattr("niels_gpt.paths.CHECKPOINT_DIR", tmp_path / "replaced")
    result = CliRunner().invoke(main, ["--config", str(config), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "replaced" / "latest.pt").exists()


def test_the_same_command_under_all_its_names(config, texts, tmp_path):
    bin_folder = Path(sys.executable).parent
    starts = [
        [sys.executable, "-m", "niels_gpt.train"],
        [sys.executable, "-m", "niels_gpt", "train"],
    ]
    starts += [[str(bin_folder / "train")]] if (bin_folder / "niels-gpt").exists() else []
    for start in starts:
        result = subprocess.run([*start, "--help"], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        assert "--config FILE" in result.stdout
        assert result.stderr == ""


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared real text is not beside this checkout")
def test_training_on_real_text_lowers_the_loss(niels, config, tmp_path):
    where = ["--wiki", SHARED / "wiki", "--roam", SHARED / "notes", "--out", tmp_path / "out"]
    more = ["train.total_steps=60", "train.eval_every=60", "train.base_lr=0.01", "model.C=16"]
    sets = [word for change in more for word in ("--set", change)]
    result = niels("train", "--config", config, "--device", "cpu", *where, *sets)
    assert result.exit_code == 0, result.stderr
    losses = [r["loss"] for r in metrics(tmp_path / "out") if r["kind"] == "train"]
    assert losses[-1] < losses[0] - 1.0
