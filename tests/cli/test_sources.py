"""Text in every command alike: notes that cannot be read, and places that hold no text."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from niels_gpt import paths
from niels_gpt.cli import main

TINY = {"T": 12, "C": 8, "L": 1, "H": 2, "d_ff": 8}
TRAIN = {"B": 2, "total_steps": 2, "eval_steps": 1, "ckpt_every": 1}

COMMANDS = {
    "train": "train --config c.json --out new --device cpu",
    "dry run": "train --config c.json --out new --device cpu --dry-run",
    "evaluate": "evaluate --ckpt run/latest.pt --device cpu",
    "info": "data info",
    "build": "data build --config c.json",
    "sample": "data sample --config c.json",
    "sweep": "sweep --config c.json --lr 1e-3",
    "replay": "replay --from run/step_0000001.pt --to run/latest.pt",
    "view": "replay --from run --step 2",
    "inspect": "inspect --ckpt run/latest.pt --batches 2 --iterations 2",
}


CONFIG = json.dumps({"model": TINY, "train": {**TRAIN, "p_train": {"wiki": 0.5, "roam": 0.5}}})


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    """The folder of a run of two steps on wiki and notes."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "c.json").write_text(CONFIG)
    config, out = str(folder / "c.json"), str(folder / "run")
    text = ["--wiki", str(texts / "wiki"), "--roam", str(texts / "notes")]
    words = ["train", "--config", config, "--out", out, "--device", "cpu", *text]
    made = CliRunner().invoke(main, words)
    assert made.exit_code == 0, made.output
    return folder / "run"


@pytest.fixture
def run(niels, trained, texts, tmp_path, monkeypatch):
    """Run a command beside that run, without its call, with a wiki, and what is given."""
    monkeypatch.setattr(paths, "REPO_ROOT", tmp_path / "root")
    monkeypatch.setattr(paths, "ROAM_DIR", tmp_path / "root/.roam-data")
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / ".run.json").unlink()
    (tmp_path / "c.json").write_text(CONFIG)
    where = ["--wiki", texts / "wiki"]
    return lambda name, *more: niels(*COMMANDS[name].split(), *where, *more)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_note_that_cannot_be_read_is_left_out_and_told(
    run, texts, tmp_path, monkeypatch, command
):
    """The other notes are those of the run, so that even a replay agrees with it."""
    notes = tmp_path / "notes"
    for note in (texts / "notes").rglob("*.md"):
        (notes / note.relative_to(texts / "notes")).parent.mkdir(parents=True, exist_ok=True)
        (notes / note.relative_to(texts / "notes")).write_bytes(note.read_bytes())
    bad = notes / "bad.md"
    bad.write_text("It can be listed, but not read.")
    read_bytes = Path.read_bytes

    def read(path):
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    result = run(command, "--roam", notes)
    assert result.exit_code == 0, result.output
    assert f"roam: 1 left out: {bad}: Input/output error" in result.output


def test_a_run_without_machine_lines_is_resumed_and_looked_at_without_them(run, texts, tmp_path):
    """The checkpoint keeps how its text was read; whoever says otherwise gets another text."""
    notes = tmp_path / "notes"
    notes.mkdir()
    for i in range(20):
        (notes / f"{i}.md").write_text(f"note {i}\n" * 9 + "data:" + "iVBOR" * 900 + "\n")
    where = ["--roam", notes]
    made = run("train", *where, "--out", "run", "--skip-machine-lines")
    assert made.exit_code == 0, made.output
    assert "20 lines of machine data such as embedded pictures" in made.output
    for command in ("replay", "view", "inspect", "evaluate"):
        result = run(command, *where)
        assert result.exit_code == 0, result.output
        assert "not the text" not in result.output
    more = ["--resume", "run/latest.pt", "--out", "run", "--set", "train.total_steps=3"]
    kept = run("train", *where, *more, "--keep-machine-lines")
    assert kept.exit_code == 2
    assert "notes without machine lines" in kept.stderr
    assert run("replay", *where, "--keep-machine-lines").exit_code == 2
    assert "not the text" in run("evaluate", *where, "--keep-machine-lines").stderr
    resumed = run("train", *where, *more)
    assert resumed.exit_code == 0, resumed.output
    refused = run("evaluate", "--text", "c.json", "--skip-machine-lines")
    assert refused.exit_code == 2


def empty_folder(folder):
    return ["--roam", folder], "no notes (*.md) under"


def blank_primer(folder):
    (folder / "primer.txt").write_text(" \n")
    return ["--primer", folder / "primer.txt"], "it has no text"


def wiki_without_val(folder):
    (folder / "train.txt").write_text("text " * 99)
    return ["--wiki", folder], "must have train.txt and val.txt"


def file_for_a_wiki(folder):
    (folder / "text.txt").write_text("text " * 99)
    return ["--wiki", folder / "text.txt"], "this is a file; it must be a folder with train.txt"


def folder_for_a_primer(folder):
    return ["--primer", folder], "this is a folder; it must be a chat primer"


def file_for_notes(folder):
    (folder / "note.md").write_text("a note")
    return ["--roam", folder / "note.md"], "this is a file; it must be a folder of markdown notes"


def nothing(folder):
    return ["--roam", folder / "absent"], "absent: no such folder"


def empty_text(folder):
    (folder / "text.txt").write_text(" \n")
    return ["--text", folder / "text.txt"], "text.txt: is empty"


def binary_text(folder):
    (folder / "text.txt").write_bytes(bytes(range(256)) * 9)
    return ["--text", folder / "text.txt"], "text.txt: no text, or not in UTF-8"


def folder_without_text(folder):
    (folder / "a.png").write_bytes(bytes(range(256)) * 9)
    return ["--text", folder], "no file has text; 1 left out:"


def no_text_at_all(folder):
    return ["--text", folder / "absent"], "--text " + str(folder / "absent: no such file or folder")


def notes_of_another_suffix(folder):
    (folder / "a.org").write_text("text")
    return ["--roam", folder], "1 text file is not read (1 .org): notes are *.md and *.markdown"


PLACES = [
    *(empty_folder, blank_primer, wiki_without_val, file_for_a_wiki, folder_for_a_primer),
    *(file_for_notes, nothing, notes_of_another_suffix),
    *(empty_text, binary_text, folder_without_text, no_text_at_all),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_is_named_and_holds_no_text_is_refused(run, tmp_path, command, place):
    """Also the primer, which has no share in `p_train`."""
    (tmp_path / "named").mkdir()
    option, message = place(tmp_path / "named")
    if command == "evaluate" and "--text" in option:
        option = [*option, "--source", "text"]  # else it scores a file as it is
    result = run(command, *option)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert not [*tmp_path.glob("new/*.pt")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_said_to_be_that(run, tmp_path):
    (tmp_path / "named").mkdir(mode=0)
    result = run("train", "--roam", tmp_path / "named")
    assert result.exit_code == 2
    assert "named' is not readable" in " ".join(result.stderr.split())


def test_a_default_source_too_short_for_a_window_does_not_stop_a_run(run, texts, tmp_path):
    (tmp_path / "root/.roam-data").mkdir(parents=True)
    (tmp_path / "root/.roam-data/a.md").write_text("short")
    result = run("train")
    assert result.exit_code == 0, result.output
    assert "roam: left out (split 'train': 5 bytes, too short for T=12" in result.output
    named = run("train", "--roam", tmp_path / "root/.roam-data")
    assert named.exit_code == 2
    assert "'roam', split 'train': 5 bytes, too short for T=12" in named.stderr
