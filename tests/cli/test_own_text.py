"""One's own text alone: `--text`, `--mix`, and the text that decides best.pt."""

import json
import os
import shlex
import shutil

import pytest

from niels_gpt import paths
from niels_gpt.checkpoint import open_checkpoint
from niels_gpt.run.metrics import read_metrics

CONFIG = {
    "model": {"T": 16, "C": 8, "L": 1, "H": 2, "d_ff": 8},
    "train": {"B": 4, "total_steps": 4, "eval_every": 2, "eval_steps": 1, "ckpt_every": 2},
}


@pytest.fixture
def train(niels, tmp_path, monkeypatch):
    """Run `niels-gpt train ARGS` where there is no text but that of the arguments."""
    monkeypatch.setattr(paths, "REPO_ROOT", tmp_path / "root")
    monkeypatch.setattr(paths, "ROAM_DIR", tmp_path / "root/.roam-data")

    def no_fallback(*args):
        raise AssertionError("the fallback text was built")

    monkeypatch.setattr("niels_gpt.data.wiki.load_python_docs", no_fallback)
    monkeypatch.setattr("niels_gpt.data.wiki.python_docs_digest", no_fallback)
    (tmp_path / "c.json").write_text(json.dumps(CONFIG))
    (tmp_path / "own.txt").write_text("".join(f"My line {n} of text.\n" for n in range(400)))
    return lambda *args: niels(
        "train", "--config", "c.json", "--device", "cpu", "--out", "a", *args
    )


def losses_of(folder):
    return [[k for k in r if "val" in k] for r in read_metrics(folder) if r["kind"] == "eval"]


def test_a_text_alone_is_trained_on_and_judged_by(train, tmp_path):
    done = train("--text", "own.txt")
    assert done.exit_code == 0, done.output
    assert "the shares are text 1" in done.stderr
    assert "best.pt is chosen by the validation loss on text" in done.stderr
    assert "val_text_loss" in done.stdout
    assert "validation loss (text)" in done.stdout
    assert "wiki" not in done.output
    kept = open_checkpoint(tmp_path / "a/best.pt")
    assert kept.state.train_cfg.p_train == {"text": 1.0}
    assert kept.state.train_cfg.val_source == "text"
    assert {*kept.sources["train"], *kept.sources["val"]} == {"text"}
    assert losses_of(tmp_path / "a/metrics.jsonl") == [["val_text_loss"]] * 2


def test_a_resume_finds_the_texts_and_their_mix_and_ends_in_the_same_bytes(
    train, niels, tmp_path, texts
):
    mix = ["--mix", "text=3,notes=1,primer=0", "--text", "own.txt", "--text", texts / "wiki"]
    whole = train(*mix, "--notes", texts / "notes")
    assert whole.exit_code == 0, whole.output
    bits = (tmp_path / "a/latest.pt").read_bytes()
    half = train(*mix, "--notes", texts / "notes", "--set", "train.total_steps=2")
    assert half.exit_code == 0, half.output
    line = half.stdout.partition("go on longer:\n  niels-gpt ")[2].splitlines()[0]
    assert line == "train --resume a/latest.pt --set train.total_steps=4"
    resumed = niels(*shlex.split(line))
    assert resumed.exit_code == 0, resumed.output
    assert "train.p_train" not in resumed.stderr
    assert (tmp_path / "a/latest.pt").read_bytes() == bits


@pytest.mark.parametrize(
    "given",
    [
        ["--text", "own.txt"],
        ["--text", "own.txt", "--notes", "{notes}"],
        ["--text", "own.txt", "--notes", "{notes}", "--mix", "roam=3,text=1"],
    ],
)
def test_a_resume_that_names_the_config_again_has_the_same_text(
    train, niels, texts, tmp_path, given
):
    given = [word.format(notes=texts / "notes") for word in given]
    shares = {"wiki": 0.5, "roam": 0.3, "primer": 0.2}  # of the config, which the call overrides
    config = {**CONFIG, "train": {**CONFIG["train"], "p_train": shares}}
    (tmp_path / "c.json").write_text(json.dumps(config))
    assert train(*given).exit_code == 0
    bits = (tmp_path / "a/latest.pt").read_bytes()
    assert train(*given, "--set", "train.total_steps=2").exit_code == 0
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for out, name in ("a", "c.json"), ("b", "other/../c.json"):  # the same config, however named
        resumed = niels("train", "--config", name, "--resume", f"{out}/latest.pt")
        assert resumed.exit_code == 0, resumed.output
        assert (tmp_path / out / "latest.pt").read_bytes() == bits


def test_shares_that_are_set_on_a_resume_are_not_those_of_the_earlier_call(train, texts, tmp_path):
    both = ["--text", "own.txt", "--notes", texts / "notes"]
    short = ["--set", "train.total_steps=2"]
    assert train(*both, "--mix", "roam=3,text=1", *short).exit_code == 0
    shares = '{"text": 0.5, "roam": 0.5}'
    resumed = train("--resume", "a/latest.pt", "--set", f"train.p_train={shares}")
    assert resumed.exit_code == 0, resumed.output
    assert open_checkpoint(tmp_path / "a/latest.pt").train_cfg["p_train"] == json.loads(shares)


def test_shares_of_another_config_are_not_those_of_the_earlier_call(train, niels, texts, tmp_path):
    both = ["--text", "own.txt", "--notes", texts / "notes", "--mix", "roam=3,text=1"]
    assert train(*both, "--set", "train.total_steps=2").exit_code == 0
    shares = {"text": 0.5, "roam": 0.5}
    other = {**CONFIG, "train": {**CONFIG["train"], "p_train": shares}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    resumed = niels("train", "--config", "other.json", "--resume", "a/latest.pt")
    assert resumed.exit_code == 0, resumed.output
    assert "note: train.p_train: " in resumed.stderr
    assert open_checkpoint(tmp_path / "a/latest.pt").train_cfg["p_train"] == shares


def test_a_share_of_nothing_leaves_a_text_out_on_a_resume(train, texts, tmp_path):
    """A text of the earlier call does not bring back the equal shares that it had."""
    both = ["--text", "own.txt", "--notes", texts / "notes", "--set", "train.total_steps=2"]
    assert train(*both).exit_code == 0
    alone = ["--set", 'train.p_train={"roam": 1.0}', "--allow-data-change"]
    resumed = train("--resume", "a/latest.pt", *alone)
    assert resumed.exit_code == 0, resumed.output
    assert open_checkpoint(tmp_path / "a/latest.pt").train_cfg["p_train"] == {"roam": 1.0}


@pytest.mark.parametrize("config", [True, False])
def test_what_judges_keeps_its_place_without_a_share(train, niels, texts, tmp_path, config):
    wiki = ["--wiki", texts / "wiki", "--text", "own.txt", "--mix", "wiki=1,text=1"]
    assert train(*wiki, "--set", "train.total_steps=2").exit_code == 0
    before = open_checkpoint(tmp_path / "a/latest.pt")
    more = ["--resume", "a/latest.pt", "--mix", "text=1", "--allow-data-change"]
    resumed = train(*more) if config else niels("train", *more, "--set", "train.total_steps=4")
    assert resumed.exit_code == 0, resumed.output
    after = open_checkpoint(tmp_path / "a/latest.pt")
    assert after.sources["val"]["wiki"] == before.sources["val"]["wiki"]
    assert {*after.sources["train"]} == {"text"}
    assert "wiki" in json.loads((tmp_path / "a/.run.json").read_text())["places"]


def test_a_resume_without_a_source_does_not_ask_where_it_went(train, niels, texts, tmp_path):
    shutil.copytree(texts / "notes", tmp_path / "notes")
    more = ["--mix", "text=3,roam=1", "--set", "train.total_steps=2"]
    assert train("--text", "own.txt", "--notes", "notes", *more).exit_code == 0
    shutil.rmtree(tmp_path / "notes")
    resume = ["train", "--resume", "a/latest.pt", "--set", "train.total_steps=4"]
    asked = niels(*resume)
    assert asked.exit_code == 2
    assert "give its place with --notes" in asked.stderr
    resumed = niels(*resume, "--mix", "text=1", "--allow-data-change")
    assert resumed.exit_code == 0, resumed.output
    assert [*open_checkpoint(tmp_path / "a/latest.pt").sources["train"]] == ["text"]


def test_what_to_tune_on_is_read_as_it_was(train, texts, tmp_path):
    done = train("--text", "own.txt", "--notes", texts / "notes", "--skip-machine-lines")
    assert done.exit_code == 0, done.output
    tune = next(line for line in done.stdout.splitlines() if "--config notes" in line)
    assert "--skip-machine-lines" in tune


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "--ckpt", "a"],
        ["inspect", "--ckpt", "a", "--only", "documents"],
        ["replay", "--from", "a/step_0000002.pt", "--to", "a/latest.pt"],
    ],
)
def test_what_looks_at_a_run_finds_its_text(train, niels, tmp_path, words):
    assert train("--text", "own.txt").exit_code == 0
    found = niels(*words)
    assert found.exit_code == 0, found.output
    assert "not the text of the run" not in found.stderr
    (tmp_path / "own.txt").unlink()
    lost = niels(*words)
    assert lost.exit_code == 2
    assert "--text" in lost.stderr


@pytest.fixture
def mixed(train, texts, tmp_path):
    """A run on wiki, on one note that gives no validation text, and on own text without a share."""
    shutil.copytree(texts / "wiki", tmp_path / "wiki")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "note.md").write_text("Only a note.\n" * 40)
    places = ["--wiki", "wiki", "--notes", "one", "--text", "own.txt"]
    done = train(*places, "--mix", "wiki=3,roam=1")
    assert done.exit_code == 0, done.output


def test_only_what_a_run_was_evaluated_on_is_scored_by_itself(mixed, niels, tmp_path):
    found = json.loads(niels("evaluate", "--ckpt", "a", "--json").stdout)
    assert {*found["sources"]} == {"wiki", "primer"}
    shutil.rmtree(tmp_path / "one")
    again = niels("evaluate", "--ckpt", "a", "--source", "wiki", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["sources"] == {"wiki": found["sources"]["wiki"]}


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "--ckpt", "a"],
        ["inspect", "--ckpt", "a", "--only", "noise", "--batches", "1"],
        ["replay", "--from", "a/step_0000002.pt", "--to", "b/latest.pt"],
    ],
)
def test_a_place_that_is_named_makes_no_command_forget_the_others(mixed, niels, tmp_path, words):
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a/latest.pt", tmp_path / "b")  # without its call
    done = niels(*words, "--primer", paths.primer_path())
    assert done.exit_code == 0, done.output
    assert "Python" not in done.output


def test_a_place_that_is_lost_and_a_damaged_call_are_told(train, niels, texts, tmp_path):
    wiki = ["--wiki", texts / "wiki"]
    assert train(*wiki, "--text", "own.txt", "--mix", "wiki=1,text=1").exit_code == 0
    (tmp_path / "own.txt").rename(tmp_path / "moved.txt")
    lost = niels("evaluate", "--ckpt", "a")
    assert lost.exit_code == 0, lost.output
    assert f"{tmp_path / 'own.txt'}, where this run had its text (text), does" in lost.stderr
    (tmp_path / "a" / ".run.json").write_text("{")
    damaged = niels("evaluate", "--ckpt", "a", "--source", "wiki", *wiki)
    assert damaged.exit_code == 0, damaged.output
    assert ".run.json: not valid JSON" in damaged.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--set", 'train.p_train={"roam": 1.0}'], "(--notes DIR names one)"),
        (["--text", "own.txt", "--out", "own.txt"], "own.txt: Not a directory"),
        (
            ["--text", "own.txt", "--resume", "a/latest.pt", "--set", "model.T=8"],
            "without --config",
        ),
        (
            ["--text", "own.txt", "--from", "a/best.pt", "--set", "model.T=8"],
            "without a model sect",
        ),
    ],
)
def test_a_message_says_what_to_do(train, given, message):
    assert train("--text", "own.txt").exit_code == 0
    done = train(*given)
    assert done.exit_code == 2
    assert message in done.stderr


def test_one_note_is_no_validation_text_and_a_file_is(train, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "own.txt").rename(tmp_path / "one" / "diary.md")
    alone = train("--notes", "one", "--mix", "notes=1")
    assert alone.exit_code == 2
    assert "--text FILE, which is split within the file" in alone.stderr
    assert train("--text", "one/diary.md").exit_code == 0


@pytest.mark.parametrize("config", ["notes", "chat"])
def test_a_second_stage_without_a_first_is_told(niels, tmp_path, config):
    (tmp_path / "own.txt").write_text("My text.\n" * 4000)
    words = ["train", "--config", config, "--text", "own.txt", "--mix", "text=1", "--dry-run"]
    done = niels(*words, *(f"--set=model.{name}={n}" for name, n in (("C", 8), ("d_ff", 8))))
    assert done.exit_code == 0, done.output
    assert f"{config} is a second stage: --from CHECKPOINT" in done.output


def test_a_config_may_be_a_pipe(train, niels, tmp_path):
    read, write = os.pipe()
    os.write(write, (tmp_path / "c.json").read_bytes())
    os.close(write)
    try:
        done = niels("train", "--config", f"/dev/fd/{read}", "--text", "own.txt", "--dry-run")
    finally:
        os.close(read)
    assert done.exit_code == 0, done.output


def test_the_largest_share_with_a_validation_text_judges_and_all_are_scored(train, texts, tmp_path):
    (tmp_path / "short.txt").write_text("A short text.\n" * 8)  # its last tenth is no window
    many = ["--text", "short.txt", "--notes", texts / "notes", "--mix", "text=9,roam=2,primer=1"]
    done = train(*many, "--primer", paths.primer_path())
    assert done.exit_code == 0, done.output
    assert "best.pt is chosen by the validation loss on roam" in done.stderr
    scored = [line for line in done.stdout.splitlines() if line.startswith("validation loss (")]
    assert [line.partition("(")[2].partition(")")[0] for line in scored] == ["roam", "primer"]


def test_a_text_too_short_to_judge_by_is_told(train, tmp_path):
    (tmp_path / "short.txt").write_text("A short text.\n" * 8)
    done = train("--text", "short.txt")
    assert done.exit_code == 2
    assert "no source has a validation text: text: its validation split has 11 bytes" in done.stderr
    assert "give more text" in done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--mix", "text=1"], "no text was given with --text; give --text FILE|DIR, or leave it"),
        (["--mix", "roam=1"], "does not exist; give --notes DIR, or leave it out of --mix"),
        (["--mix", "text=1,roam=1", "--text", "own.txt"], "source 'roam' cannot be built"),
    ],
)
def test_a_source_of_the_mix_that_is_not_there_is_refused(train, tmp_path, given, message):
    done = train(*given)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not [*tmp_path.glob("a/*.pt")]


def test_wiki_judges_where_it_is_asked_for(train, texts, tmp_path):
    wiki = ["--wiki", texts / "wiki"]
    shared = train("--text", "own.txt", *wiki)
    assert "the shares are wiki 0.5, text 0.5" in shared.stderr
    named = train("--text", "own.txt", *wiki, "--mix", "text=1")
    for done in (shared, named):
        assert done.exit_code == 0, done.output
        assert "val_wiki_loss" in done.stdout
        assert "best.pt is chosen" not in done.stderr
    assert "validation loss (text)" in named.stdout
    assert open_checkpoint(tmp_path / "a/best.pt").val_source == "wiki"


def test_a_resumed_run_keeps_what_judges_it_and_says_what_changes(train, texts, tmp_path):
    """Also one of a version that always judged by wiki, of a config without a share for it."""
    wiki = ["--wiki", texts / "wiki", "--text", "own.txt", "--mix", "text=1"]
    assert train(*wiki, "--set", "train.total_steps=2").exit_code == 0
    config = CONFIG["train"] | {"p_train": {"text": 1.0}}
    (tmp_path / "c.json").write_text(json.dumps({**CONFIG, "train": config}))
    (tmp_path / "root/data").mkdir(parents=True, exist_ok=True)
    (tmp_path / "root/data/wiki").symlink_to(texts / "wiki")
    kept = train("--text", "own.txt", "--resume", "latest")
    assert kept.exit_code == 0, kept.output
    assert "val_wiki_loss" in kept.stdout
    other = ["--set", "train.val_source=text", "--set", "train.total_steps=6"]
    refused = train("--text", "own.txt", "--resume", "latest", *other)
    assert refused.exit_code == 2
    assert "val/wiki: folder" in refused.stderr
    more = train("--text", "own.txt", "--resume", "latest", *other, "--allow-data-change")
    assert more.exit_code == 0, more.output
    assert "train.val_source: 'wiki' in the checkpoint, now 'text'" in more.stderr
    assert "the validation text changed" in more.stderr
    assert losses_of(tmp_path / "a/metrics.jsonl") == 2 * [["val_wiki_loss"]] + 2 * [
        ["val_text_loss"]
    ]


def test_every_command_reads_the_text_of_such_a_run(train, niels, tmp_path):
    assert train("--text", "own.txt").exit_code == 0
    text = ["--text", "own.txt"]
    for command in (
        "replay --to a/latest.pt --device cpu",
        "replay --from a --step 2 --device cpu",
        "inspect --ckpt a/latest.pt --only noise --batches 2",
        "data sample --config c.json -n 1",
        "sweep --config c.json --lr 1e-3",
    ):
        done = niels(*command.split(), *text)
        assert done.exit_code == 0, (command, done.output)
    part = niels("evaluate", "--ckpt", "a/latest.pt", *text, "--source", "text", "--full")
    assert part.exit_code == 0, part.output
    assert "not the text of the run" not in part.stderr
    whole = niels("evaluate", "--ckpt", "a/latest.pt", *text, "--full")
    assert whole.exit_code == 0, whole.output
    assert "own.txt: scored as a whole" in whole.stderr
    (scored,) = [line for line in whole.stdout.splitlines() if line.startswith("own.txt")]
    assert scored.split()[-1] == f"{(tmp_path / 'own.txt').stat().st_size:,}"


def test_evaluate_scores_the_sources_of_a_run_without_wiki(train, niels, texts):
    """No fallback text is built for it either."""
    assert train("--text", "own.txt", "--notes", texts / "notes").exit_code == 0
    whole = niels("evaluate", "--ckpt", "a")
    assert whole.exit_code == 0, whole.output
    assert {line.split()[0] for line in whole.stdout.splitlines()[2:]} == {"text", "roam"}
    named = niels("evaluate", "--ckpt", "a", "--text", "own.txt", "--source", "text")
    assert [line.split()[0] for line in named.stdout.splitlines()[2:]] == ["text"]


@pytest.mark.parametrize(
    "more", [["--source", "wiki"], ["--notes", "."], ["--text", "c.json"]], ids=str
)
def test_evaluate_scores_one_file_as_it_is_or_sources(train, niels, more):
    assert train("--text", "own.txt").exit_code == 0
    refused = niels("evaluate", "--ckpt", "a/latest.pt", "--text", "own.txt", *more)
    assert refused.exit_code == 2
    assert "--source text" in " ".join(refused.stderr.split())
