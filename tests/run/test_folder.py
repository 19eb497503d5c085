"""What a resumed run leaves and names: only its own checkpoint, in its own folder."""

import shlex
from signal import SIGINT, SIGTERM

import pytest

from niels_gpt.checkpoint import open_checkpoint
from niels_gpt.corpus import Corpus
from niels_gpt.run import folder as run_folder
from niels_gpt.run import session
from niels_gpt.step import train_step
from tests.reliability.signalled import signalling
from tests.training import same_state


@pytest.fixture
def interrupted(train, monkeypatch):
    """Run `train ARGS`, and press Ctrl-C before its first update."""

    def run(*args, **changes):
        with monkeypatch.context() as patch:
            patch.setattr(session, "say_opening", signalling(session.say_opening, 1, [SIGINT]))
            return train(*args, **changes)

    return run


def resume_words(output):
    """Return the arguments of the command with which an output says to resume."""
    (line,) = (line for line in output.splitlines() if line.startswith("resume with: "))
    program, *words = shlex.split(line.removeprefix("resume with: "))
    assert program == "niels-gpt"
    return words


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.pt")}


@pytest.mark.parametrize("total", [8, 4])
def test_a_finished_run_resumed_into_another_folder_is_there(train, tmp_path, total):
    train("--out", "a", total_steps=total)
    result = train("--resume", "a/latest.pt", "--out", "b", total_steps=total)
    assert result.exit_code == 0, result.output
    a, b = (open_checkpoint(tmp_path / name / "latest.pt").state for name in "ab")
    assert b.step == total
    assert same_state(a, b)
    assert f"niels-gpt train --resume b/latest.pt --set train.total_steps={2 * total}" in (
        result.stdout
    )


@pytest.mark.parametrize("name", ["step_0000003.pt", "step_0000004.pt"])
def test_a_resume_elsewhere_that_is_stopped_at_once_has_its_own_checkpoint(
    train, interrupted, tmp_path, name
):
    train("--out", "a")
    before = contents(tmp_path / "a")
    result = interrupted("--resume", f"a/{name}", "--out", "b")
    assert result.exit_code == 130, result.output
    saved = open_checkpoint(tmp_path / "b" / "latest.pt")
    assert saved.step == open_checkpoint(tmp_path / "a" / name).step
    assert resume_words(result.stderr)[-2:] == ["--resume", "b/latest.pt"]
    assert train("--resume", "b/latest.pt").exit_code == 0
    assert same_state(*(open_checkpoint(tmp_path / out / "latest.pt").state for out in "ab"))
    assert contents(tmp_path / "a") == before


def test_an_abandoned_latest_is_not_the_one_to_resume(train, interrupted, tmp_path):
    train("--out", "a")
    abandoned = (tmp_path / "a" / "latest.pt").read_bytes()
    result = interrupted("--resume", "a/step_0000004.pt", base_lr=0.01)
    assert result.exit_code == 130, result.output
    latest = open_checkpoint(tmp_path / "a" / "latest.pt")
    assert (latest.step, latest.train_cfg["base_lr"]) == (4, 0.01)
    assert "last good checkpoint: a/latest.pt" in result.stderr
    assert (tmp_path / "a" / "earlier-001" / "latest.pt").read_bytes() == abandoned


@pytest.mark.parametrize("stop", [True, False])
def test_a_latest_that_is_this_very_state_is_left_alone(
    train, interrupted, tmp_path, monkeypatch, stop
):
    train("--out", "a", total_steps=4)
    total = 8 if stop else 4
    if stop:  # a run of the same config that is stopped has the same latest.pt
        interrupted("--resume", "a/latest.pt", total_steps=8)
    before = contents(tmp_path / "a")
    monkeypatch.setattr(run_folder, "write_checkpoint", None)
    result = (interrupted if stop else train)("--resume", "a/latest.pt", total_steps=total)
    assert result.exit_code == (130 if stop else 0), result.output
    assert contents(tmp_path / "a") == before
    assert "train --resume a/latest.pt" in result.output


def test_a_finished_run_under_another_config_records_it(train, tmp_path):
    train("--out", "a", total_steps=4)
    train("--resume", "a/latest.pt", total_steps=4, log_every=7)
    assert open_checkpoint(tmp_path / "a" / "latest.pt").train_cfg["log_every"] == 7


def test_where_nothing_could_be_saved_the_line_resumes_from_what_there_is(
    train, interrupted, monkeypatch
):
    train("--out", "a", total_steps=4)

    def full(paths, checkpoint):
        raise OSError(28, "No space left on device", str(paths[0]))

    monkeypatch.setattr(run_folder, "write_checkpoint", full)
    result = interrupted("--resume", "a/latest.pt", "--out", "b")
    assert result.exit_code == 1
    assert "last good checkpoint: a/latest.pt" in result.stderr
    words = resume_words(result.stderr)
    assert words[:3] == ["train", "--resume", "a/latest.pt"]
    assert words[-2:] == ["--out", "b"]
    fresh = interrupted("--out", "c")
    assert fresh.exit_code == 1
    assert "no checkpoint yet" in fresh.stderr
    assert "resume with" not in fresh.output


@pytest.fixture
def failing_once(monkeypatch):
    """Let the save of best.pt after step 4 fail, of a run with these validation losses."""
    losses, write = iter([5.0, 3.0, 4.0, 4.5]), run_folder.write_checkpoint

    def full_once(paths, checkpoint):
        if checkpoint.step == 4 and paths[0].name == "best.pt" and checkpoint.step not in failed:
            failed.append(checkpoint.step)
            raise OSError(28, "No space left on device", str(paths[0]))
        return write(paths, checkpoint)

    failed: list[int] = []
    monkeypatch.setattr(run_folder, "write_checkpoint", full_once)
    monkeypatch.setattr(session, "evaluate", lambda *args, **more: next(losses, 9.0))
    return failed


def test_a_best_that_could_not_be_saved_is_saved_with_the_next(train, failing_once, tmp_path):
    result = train("--out", "a", ckpt_every=4)
    assert result.exit_code == 0, result.output
    assert failing_once == [4]
    assert "SAVE FAILED after step 4" in result.stderr
    assert "the next save will retry, but not step_0000004.pt" in result.stderr
    best, latest = (open_checkpoint(tmp_path / "a" / f"{name}.pt") for name in ("best", "latest"))
    assert (best.step, best.scores.best_val_loss) == (4, 3.0)
    assert (latest.step, latest.scores.best_step) == (8, 4)


def test_a_best_that_can_never_be_saved_prevents_no_other_file(train, monkeypatch, tmp_path):
    """As one that is locked in Finder: the run ends with code 1 and everything else."""
    write = run_folder.write_checkpoint

    def locked(paths, checkpoint):
        if paths[0].name == "best.pt":
            raise PermissionError(1, "Operation not permitted", str(paths[0]))
        return write(paths, checkpoint)

    monkeypatch.setattr(run_folder, "write_checkpoint", locked)
    result = train("--out", "a", ckpt_every=2)
    assert result.exit_code == 1
    assert "the final save failed; last good checkpoint: a/latest.pt" in result.stderr
    there = sorted(path.name for path in (tmp_path / "a").glob("*.pt"))
    assert there == ["latest.pt", *(f"step_000000{k}.pt" for k in (2, 4, 6, 8))]
    assert open_checkpoint(tmp_path / "a" / "latest.pt").step == 8
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert train("--resume", "a/latest.pt", "--out", "a").exit_code == 0


def test_a_resume_in_its_folder_that_cannot_write_there_strands_nothing(
    train, niels, monkeypatch, tmp_path
):
    """The metrics and the call of the run are there until new ones have replaced them."""
    train("--out", "a", total_steps=4)
    kept = {name: (tmp_path / "a" / name).read_bytes() for name in ("metrics.jsonl", ".run.json")}

    def full(*args):
        raise OSError(28, "No space left on device", "a")

    with monkeypatch.context() as patch:
        patch.setattr("niels_gpt.run.metrics.MetricsFile.claim", full)
        patch.setattr("niels_gpt.run.call.Call.write", full)
        assert train("--resume", "a/step_0000002.pt").exit_code == 1
    for name, data in kept.items():
        assert (tmp_path / "a" / name).read_bytes() == data
        assert (tmp_path / "a" / "earlier-001" / name).read_bytes() == data
    resumed = niels("train", "--resume", "a/step_0000002.pt", "--set", "train.total_steps=3")
    assert resumed.exit_code == 0, resumed.output


@pytest.fixture
def stopped(train, monkeypatch):
    """Run `train ARGS`, and send SIGTERM while it draws its third batch."""

    def run(*args, **changes):
        with monkeypatch.context() as patch:
            patch.setattr(Corpus, "batch", signalling(Corpus.batch, 3, [SIGTERM]))
            return train(*args, **changes)

    return run


def test_the_line_that_resumes_is_enough(train, stopped, niels, tmp_path):
    """The checkpoint has the config with what was set, and the text is found again."""
    more = ("--set", "model.dropout=0.2", "--sample-every-eval")
    result = stopped("--out", "an out", *more, base_lr=0.01)
    words = resume_words(result.stderr)
    assert words == ["train", "--resume", "an out/latest.pt", "--sample-every-eval"]
    (tmp_path / "c.json").rename(tmp_path / "gone.json")
    resumed = niels(*words)
    assert resumed.exit_code == 0, resumed.output
    (tmp_path / "gone.json").rename(tmp_path / "c.json")
    train("--out", "whole", *more, base_lr=0.01)
    assert contents(tmp_path / "an out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("flag", ["--compile", "--no-compile", "--allow-data-change"])
def test_before_the_first_save_the_line_that_resumes_has_what_was_given(
    train, interrupted, monkeypatch, flag, texts
):
    train("--out", "first", total_steps=2)

    def full(paths, checkpoint):
        raise OSError(28, "No space left on device", str(paths[0]))

    monkeypatch.setattr(run_folder, "write_checkpoint", full)
    monkeypatch.setattr(session, "choose_step", lambda state, batch, say: (train_step, True))
    resume = ["--resume", "first/latest.pt", "--no-sample"]
    result = interrupted("--out", "an out", *resume, flag, base_lr=0.01)
    words = resume_words(result.stderr)
    for pair in (
        ["--config", "c.json"],
        ["--set", "train.base_lr=0.01"],
        ["--wiki", str(texts / "wiki")],
        ["--notes", str(texts / "notes")],
        ["--device", "cpu"],
        ["--resume", "first/latest.pt"],
        ["--out", "an out"],
    ):
        assert words[words.index(pair[1]) - 1 :][:2] == pair
    assert {flag, "--no-sample"} <= {*words}
    assert [word for word in words if word.startswith("--no-c") or word == "--compile"] == [
        word for word in [flag] if "compile" in word
    ]
