"""The group: what it knows without loading torch, its version, and shell completion."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version

import pytest

from niels_gpt.cli import main
from tests import ROOT

COMMANDS = main.list_commands(None)

NO_TORCH = """
import sys
sys.modules["torch"] = None
from niels_gpt.cli import main
main(prog_name="niels-gpt")
"""


def test_version_tells_what_decides_the_bits(niels):
    result = niels("--version")
    assert result.exit_code == 0
    for part in (
        f"torch {version('torch').partition('+')[0]}",
        f"Python {platform.python_version()}",
        "device ",
    ):
        assert part in result.stdout


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=str)
def test_help_needs_no_torch(words):
    """The whole help of a command, in a process that cannot import torch."""
    result = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *words, "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Usage: niels-gpt")


def test_every_module_of_the_folder_is_a_command_and_is_listed(niels):
    text = niels("--help").stdout
    listed = [line.split()[0] for line in text.partition("Commands:")[2].splitlines() if line]
    modules = {file.stem for file in (ROOT / "niels_gpt" / "cli").glob("*.py")} - {"__init__"}
    assert listed == sorted(modules) == COMMANDS
    assert {"train", "sample", "chat"} <= modules


def test_what_stdout_cannot_write_is_no_traceback(niels_process, tmp_path):
    name = "\N{SEEDLING}.json"
    (tmp_path / name).write_text("{}")
    odd = niels_process("config", "show", "--config", name, "--set", "train.B=2")
    plain = niels_process(
        "config", "show", "--config", name, "--json", PYTHONIOENCODING="ascii", PYTHONUTF8="0"
    )
    assert (odd.returncode, plain.returncode) == (0, 0), plain.stderr


def test_an_unknown_command_is_told(niels):
    result = niels("trian")
    assert result.exit_code == 2
    assert "No such command 'trian' (did you mean train?)" in result.stderr
    assert "(did you mean verify?)" in niels("checkpoint", "verfy").stderr
    assert "(known: build, fetch, info, sample)" in niels("data", "zzz").stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("niels-gpt ", COMMANDS),
        ("niels-gpt ch", ["chat", "checkpoint"]),
        ("niels-gpt checkpoint ", ["info", "verify", "diff", "export"]),
        ("niels-gpt train --resume ", [""]),  # "file," lets the shell complete file names
        (
            "niels-gpt train --config ",
            ["", *sorted(p.stem for p in (ROOT / "configs").glob("*.json"))],
        ),
        ("niels-gpt data info --config sm", ["sm", "smoke"]),
        ("niels-gpt sweep --set train.b", ["train.base_lr="]),
        ("niels-gpt plot --x ", ["steps", "bytes", "hours"]),
    ],
)
def test_bash_completes_commands_and_choices(niels_process, words, expected):
    found = niels_process(
        _NIELS_GPT_COMPLETE="bash_complete",
        COMP_WORDS=words,
        COMP_CWORD=str(words.count(" ")),
    )
    assert sorted(line.partition(",")[2] for line in found.stdout.split()) == sorted(expected)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(niels_process, shell):
    found = niels_process(_NIELS_GPT_COMPLETE=f"{shell}_source")
    assert "niels-gpt" in found.stdout
