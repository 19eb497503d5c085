"""A best belongs to a validation text and to a folder."""

import pytest

from niels_gpt.checkpoint import open_checkpoint

FALLING_AND_RISING = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.2}
LATE = {2: 2.0, 4: 3.0, 6: 2.5, 8: 1.0}


@pytest.fixture
def losses(monkeypatch):
    """Let the evaluation after each step have a given result."""

    def given(by_step):
        monkeypatch.setattr(
            "niels_gpt.run.session.evaluate", lambda state, *_, **__: by_step[state.step]
        )

    return given


def best_and_latest(folder):
    """Return the step of best.pt, and what latest.pt says of it; they agree in any case."""
    best, latest = (open_checkpoint(folder / name) for name in ("best.pt", "latest.pt"))
    assert best.scores.best_step == best.step == latest.scores.best_step
    assert best.scores.best_val_loss == best.scores.val_loss == latest.scores.best_val_loss
    return best.step, latest.scores.best_val_loss


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.pt")}


@pytest.mark.parametrize(
    ("resumed", "best", "told"),
    [
        (3, (4, 2.0), True),  # of step 2, better than nothing
        (4, (4, 2.0), False),  # itself the best
        (5, (8, 2.2), True),
        (6, (8, 2.2), True),  # starts with its own evaluation
        (8, (8, 2.2), True),  # finished
    ],
)
def test_in_another_folder_the_best_starts_anew(train, losses, tmp_path, resumed, best, told):
    losses(FALLING_AND_RISING)
    train("--out", "a")
    before = contents(tmp_path / "a")
    result = train("--resume", f"a/step_{resumed:07d}.pt", "--out", "b")
    assert result.exit_code == 0, result.output
    assert best_and_latest(tmp_path / "b") == best
    assert ("starts anew" in result.stderr) == told
    assert contents(tmp_path / "a") == before


@pytest.mark.parametrize("resumed", range(1, 9))
@pytest.mark.parametrize("by_step", [FALLING_AND_RISING, LATE])
def test_in_place_it_ends_as_it_did(train, losses, tmp_path, resumed, by_step):
    losses(by_step)
    train("--out", "a")
    whole = contents(tmp_path / "a")
    result = train("--resume", f"a/step_{resumed:07d}.pt")
    assert result.exit_code == 0, result.output
    ends = contents(tmp_path / "a")
    best_and_latest(tmp_path / "a")
    assert {name: ends[name] for name in ("best.pt", "latest.pt")} == {
        name: whole[name] for name in ("best.pt", "latest.pt")
    }


def test_in_place_before_a_best_that_moves_aside_there_is_a_new_one(train, losses, tmp_path):
    losses(LATE)
    train("--out", "a")
    old = (tmp_path / "a" / "best.pt").read_bytes()
    losses({4: 3.0, 6: 2.5, 8: 2.6})
    result = train("--resume", "a/step_0000003.pt", base_lr=0.01)
    assert "a/best.pt is not the best that a/step_0000003.pt knows (2.0000 nats after step 2)" in (
        result.stderr
    )
    assert best_and_latest(tmp_path / "a") == (6, 2.5)
    assert (tmp_path / "a" / "earlier-001" / "best.pt").read_bytes() == old


@pytest.mark.parametrize("how", ["missing", "damaged", "of another run"])
def test_a_best_that_is_not_there_is_not_claimed(train, losses, tmp_path, how):
    losses(FALLING_AND_RISING)
    train("--out", "a", total_steps=7)
    best = tmp_path / "a" / "best.pt"
    if how == "missing":
        best.unlink()
    elif how == "damaged":
        best.write_bytes(best.read_bytes()[:1000])
    else:
        best.write_bytes((tmp_path / "a" / "step_0000002.pt").read_bytes())
    losses({7: 9.0, 8: 8.0})
    result = train("--resume", "latest", "--out", "a")
    assert result.exit_code == 0, result.output
    assert "starts anew" in result.stderr
    assert best_and_latest(tmp_path / "a") == (8, 8.0)


@pytest.mark.parametrize("step", [5, 6, 8])
def test_a_changed_validation_text_has_a_best_of_its_own(train, losses, tmp_path, other_wiki, step):
    losses(FALLING_AND_RISING)
    train("--out", "a")
    resume = ["--resume", f"a/step_{step:07d}.pt", "--allow-data-change"]
    losses({6: 7.0, 8: 7.5})
    result = train(*resume, wiki=other_wiki)
    assert result.exit_code == 0, result.output
    assert "the validation text changed: the best validation loss (2.0000 nats after step 4)" in (
        result.stderr
    )
    assert best_and_latest(tmp_path / "a") == ((8, 7.5) if step == 8 else (6, 7.0))
    again = train("--resume", "a/latest.pt", wiki=other_wiki)
    assert again.exit_code == 0, again.output
    assert "starts anew" not in again.stderr


def test_a_changed_training_text_leaves_the_best_alone(train, losses, tmp_path, texts):
    losses(FALLING_AND_RISING)
    train("--out", "a", total_steps=6)
    (tmp_path / "more").mkdir()
    for name in ("train.txt", "val.txt"):
        text = (texts / "wiki" / name).read_text()
        (tmp_path / "more" / name).write_text(text + "More." * (name == "train.txt"))
    result = train("--resume", "a/latest.pt", "--allow-data-change", wiki=tmp_path / "more")
    assert result.exit_code == 0, result.output
    assert open_checkpoint(tmp_path / "a" / "latest.pt").step == 8
    assert "starts anew" not in result.stderr
    assert best_and_latest(tmp_path / "a") == (4, 2.0)


def test_the_records_of_another_validation_text_are_kept(train, tmp_path, other_wiki):
    train("--out", "a", total_steps=5)
    before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    for total in (6, 7):  # the second resumes a checkpoint that was written under the new text
        resume = ["--resume", "a/latest.pt", "--allow-data-change"]
        assert train(*resume, wiki=other_wiki, total_steps=total).exit_code == 0
        after = (tmp_path / "a" / "metrics.jsonl").read_bytes()
        assert after.startswith(before)
        assert len(after) > len(before)
