"""The `inspect` command on a small run."""

import json

import pytest


@pytest.fixture
def ckpt(niels, texts, tmp_path):
    config = tmp_path / "config.json"
    model = {"T": 12, "C": 8, "L": 1, "H": 2, "d_ff": 8}
    train = {"B": 4, "total_steps": 3, "eval_steps": 1, "warmup_steps": 0}
    config.write_text(json.dumps({"model": model, "train": train}))
    out = tmp_path / "checkpoints"
    where = ["--wiki", texts / "wiki", "--roam", texts / "notes", "--device", "cpu"]
    result = niels("train", "--config", config, "--out", out, *where)
    assert result.exit_code == 0, result.output
    return out / "latest.pt"


@pytest.fixture
def inspect(niels, texts, ckpt):
    where = ["--wiki", texts / "wiki", "--roam", texts / "notes"]
    return lambda *args: niels("inspect", "--ckpt", ckpt, *where, *args)


def test_all_three_parts_are_told(inspect):
    result = inspect("--batches", 2, "--iterations", 3, "--top", 4)
    assert result.exit_code == 0, result.output
    for words in (
        "latest.pt, after step 3",
        "from 8 rows",
        "AdamW is stable up to lr",
        "11 documents",
    ):
        assert words in result.stdout
    assert result.stdout.count("/note ") == 8
    for words in ("half the progress", "train.B would", "the loss bends", "train.base_lr"):
        assert words in result.stdout


def test_documents_shorter_than_a_window_are_apart(inspect, texts):
    from niels_gpt.analysis.influence import Influence
    from niels_gpt.cli.inspect import _worth_lines
    from tests.training import trained_state

    state = trained_state()
    T = state.model_cfg.T
    worth = [Influence("short", T, 9.0), Influence("long", T + 1, 0.5), Influence("bad", 99, -0.5)]
    lines = _worth_lines(worth, state, 10)
    named = [line.split()[-1] for line in lines if " bytes  " in line]
    assert named == ["long", "bad", "bad", "long"]
    text = "\n".join(lines)
    assert f"1 of fewer than {T + 1} bytes, a window of the model, apart" in text
    assert "1 of 3 hurt; the median is +0.500" in text


def test_one_part_alone_as_json_has_every_document_by_name(inspect):
    result = inspect("--only", "documents", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found) == ["checkpoint", "step", "documents"]
    assert len({d["name"] for d in found["documents"]}) == 11
    assert inspect("--only", "documents", "--json").stdout == result.stdout


def test_under_muon_the_sharpness_is_told_without_adamws_part(niels, texts, tmp_path):
    config = tmp_path / "config.json"
    model = {"T": 12, "C": 8, "L": 1, "H": 2, "d_ff": 8}
    train = {"B": 4, "total_steps": 3, "eval_steps": 1, "optimizer": "muon", "init": "fan_in"}
    config.write_text(json.dumps({"model": model, "train": train}))
    where = ["--wiki", texts / "wiki", "--roam", texts / "notes"]
    niels("train", "--config", config, "--out", tmp_path, *where, "--device", "cpu")
    result = niels("inspect", "--ckpt", tmp_path / "latest.pt", *where, "--iterations", 2)
    assert result.exit_code == 0, result.output
    assert "because the optimizer of the run is muon" in result.stdout
    assert "stable up to lr" in result.stdout


def test_other_text_and_missing_files_are_refused(niels, texts, ckpt):
    result = niels("inspect", "--ckpt", ckpt, "--roam", texts / "wiki")  # no notes
    assert result.exit_code == 2
    (ckpt.parent / "other").mkdir()
    (ckpt.parent / "other" / "note.md").write_text("Another note.\n" * 99)
    result = niels("inspect", "--ckpt", ckpt, "--roam", ckpt.parent / "other")
    assert result.exit_code == 2
    assert "differs from the text it was trained on" in result.stderr
    result = niels("inspect", "--ckpt", "nowhere.pt")
    assert result.exit_code == 2
    assert "nowhere.pt" in result.stderr


def test_without_notes_the_other_parts_are_told(niels, texts, tmp_path):
    """Documents are found first, so that an error wastes no measurement."""
    config = tmp_path / "config.json"
    model = {"T": 12, "C": 8, "L": 1, "H": 2, "d_ff": 8}
    config.write_text(json.dumps({"model": model, "train": {"B": 2, "total_steps": 2}}))
    where = ["--wiki", texts / "wiki"]
    args = ["--config", config, "--out", "out", "--set", "train.eval_steps=1", "--device", "cpu"]
    assert niels("train", *args, *where).exit_code == 0
    given = ["inspect", "--ckpt", "out/latest.pt", *where]
    result = niels(*given, "--iterations", 2)
    assert result.exit_code == 0, result.output
    assert "note: no documents: " in result.stderr
    assert "AdamW is stable up to lr" in result.stdout
    result = niels(*given, "--only", "documents")
    assert result.exit_code == 2
    assert "error: " in result.stderr


def test_documents_lost_in_noise_cost_no_other_part(inspect, monkeypatch):
    from niels_gpt.analysis import influence

    real = influence.validation_gradient
    monkeypatch.setattr(influence, "validation_gradient", lambda *args: (real(*args)[0], -0.1))
    result = inspect("--iterations", 2)
    assert result.exit_code == 0, result.output
    assert "note: no documents: the gradient of 4 validation batches is lost" in result.stderr
    assert "AdamW is stable up to lr" in result.stdout
    assert inspect("--only", "documents").exit_code == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--only", "noise", "--windows", 3], "--windows has no effect on noise"),
        (["--only", "sharpness", "--batches", 3], "--batches has no effect on sharpness"),
        (["--only", "documents", "--iterations", 3], "--iterations has no effect on documents"),
        (["--json", "--top", 3], "--top has no effect with --json"),
    ],
)
def test_an_option_of_a_part_that_is_not_wanted_is_refused(inspect, args, message):
    result = inspect(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_the_suggested_batch_has_a_row_and_products_too_few_are_said(inspect):
    from niels_gpt.analysis.noise import NoiseScale
    from niels_gpt.cli.inspect import _noise_lines
    from tests.training import trained_state

    lines = _noise_lines(NoiseScale(8, 0.2, 0.1, 0.3, 1.0, 0.2), trained_state())
    assert "B = 1:" in lines[-1]
    result = inspect("--only", "sharpness", "--iterations", 1)
    assert "not converged: it may be larger" in result.stdout


@pytest.mark.parametrize(("option", "most"), [("--batches", 1000), ("--iterations", 200)])
def test_work_without_an_end_is_refused_with_the_bound(inspect, option, most):
    result = inspect(option, 10**9)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"'{option}': {10**9} is not in the range 1<=x<={most}" in result.stderr
