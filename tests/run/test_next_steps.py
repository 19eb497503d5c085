"""What a finished run prints to go on with: every command is run as it is printed."""

import itertools
import json
import shlex
import subprocess
import sys

import pytest

from niels_gpt.checkpoint import open_checkpoint
from niels_gpt.cli.shared import program
from niels_gpt.run.options import Program
from tests import ROOT
from tests.run.conftest import TINY


def printed(output):
    """Return the commands that a finished run printed, by what they are for."""
    lines = output.splitlines()
    return {
        what.removesuffix(":"): line.strip()
        for what, line in itertools.pairwise(lines)
        if line.startswith("  niels-gpt ") or "bin/" in line[:10]
    }


WHAT = [
    "continue a text",
    "talk with it",
    "see the losses",
    "go on longer",
    "fine-tune it on the notes alone",
]


def test_every_command_of_a_finished_run_works_as_printed(train, niels, tmp_path):
    result = train("--out", "an out", total_steps=4)
    commands = printed(result.stdout)
    assert list(commands) == WHAT
    for what, line in commands.items():
        name, *words = shlex.split(line)
        assert name == "niels-gpt"
        done = niels(*words)
        assert done.exit_code == 0, (what, done.output)
    assert open_checkpoint(tmp_path / "an out" / "latest.pt").step == 8
    tuned = open_checkpoint(tmp_path / "an out" / "notes" / "latest.pt")
    assert tuned.train_cfg["p_train"] == {"roam": 1.0}
    assert tuned.ancestors


def test_what_a_script_prints_is_pasted_into_a_shell(texts, tmp_path):
    """The script is in a folder that is not on the path, as `.venv/bin/train` is."""
    (tmp_path / "bin").mkdir()
    for name, module in (("train", "niels_gpt.train"), ("niels-gpt", "niels_gpt.cli")):
        script = tmp_path / "bin" / name
        script.write_text(
            f"#!{sys.executable} -Wignore\nimport sys; sys.path.insert(0, {str(ROOT)!r})\n"
            f"from {module} import main; main()\n"
        )
        script.chmod(0o755)
    (tmp_path / "c.json").write_text(json.dumps(TINY))
    command = f"bin/train --config c.json --wiki {texts / 'wiki'} --device cpu --out out"
    more = " --set train.total_steps=2 --mix wiki=1"

    def bash(line):
        return subprocess.run(
            ["bash", "-ec", line],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            stdin=subprocess.DEVNULL,
        )

    first = bash(command + more)
    assert first.returncode == 0, first.stderr
    commands = printed(first.stdout)
    assert [line.split()[0] for line in commands.values()] == [
        *["bin/niels-gpt"] * 3,
        *["bin/train"] * 2,
    ]
    pasted = bash("\n".join([commands["continue a text"], commands["teach it to chat"]]))
    assert pasted.returncode == 0, pasted.stderr
    tuned = open_checkpoint(tmp_path / "out" / "chat" / "best.pt")
    assert tuned.train_cfg["p_train"] == {"primer": 1.0}


def test_a_run_on_text_and_dialogues_goes_on_with_the_text(niels, tmp_path):
    (tmp_path / "novel.txt").write_text("It was a dark and stormy night.\n" * 99)
    (tmp_path / "c.json").write_text(json.dumps(TINY))
    given = ["--text", "novel.txt", "--mix", "text=9,primer=1", "--set", "train.total_steps=2"]
    result = niels("train", "--config", "c.json", "--out", "o", "--device", "cpu", *given)
    assert result.exit_code == 0, result.output
    _, *words = shlex.split(printed(result.stdout)["fine-tune it on the text alone"])
    tuned = niels(*words, "--dry-run", "--json")
    assert tuned.exit_code == 0, tuned.output
    assert list(json.loads(tuned.stdout)["sources"]["val"]) == ["text"]


MODULE = ("py", "-m", "niels_gpt")


@pytest.mark.parametrize(
    ("module", "argv", "expected"),
    [
        (
            "niels_gpt.train",
            "/x/train.py",
            (MODULE, ("py", "-m", "niels_gpt.train")),
        ),
        (
            "niels_gpt.__main__",
            "/x/__main__.py",
            (MODULE, (*MODULE, "train")),
        ),
        (None, "v/bin/train", (("v/bin/niels-gpt",), ("v/bin/train",))),
        (None, "v/bin/niels-gpt", (("v/bin/niels-gpt",), ("v/bin/niels-gpt", "train"))),
        (None, "path/niels-gpt", (("niels-gpt",), ("niels-gpt", "train"))),
        (None, "path/train", (("niels-gpt",), ("train",))),
        (None, "alone/train", ((sys.executable, "-m", "niels_gpt"), ("alone/train",))),
        (None, "pytest", Program()),
    ],
)
def test_a_command_begins_as_the_program_was_called(tmp_path, monkeypatch, module, argv, expected):
    for folder in ("v/bin", "path", "alone"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("train",) if folder == "alone" else ("train", "niels-gpt"):
            (tmp_path / folder / name).touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    spec = None if module is None else type("Spec", (), {"name": module})
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", [argv])
    monkeypatch.setattr(sys, "orig_argv", ["py", "-m", "..."])
    assert program.this_program() == expected


def test_a_resumed_run_tells_the_losses_of_the_whole(train, tmp_path):
    train("--out", "a", total_steps=4)
    result = train("--resume", "a/latest.pt", total_steps=6)
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    losses = [r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"]
    assert f"first logged {losses[0]:.4f}, last {losses[-1]:.4f}" in result.stdout
    assert " in all\n" in result.stdout
    again = train("--resume", "a/latest.pt", total_steps=6)
    assert f"first logged {losses[0]:.4f}, last {losses[-1]:.4f}" in again.stdout
