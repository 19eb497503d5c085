"""How commands print and exit, with closed or broken streams and on Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections import namedtuple

import pytest
import torch

from niels_gpt.cli.shared import output
from niels_gpt.cli.shared.output import Console, Task, describe, to_json
from tests.checkpoints import random_payload

FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is full: Linux")


def bash(command, tmp_path, **more):
    """Run a line of bash with $NIELS as the command; return the finished process."""
    niels = f"{sys.executable} -m niels_gpt"
    commands = {"NIELS": niels, "TRAIN": f"{niels}.train"}
    env = {**os.environ, **commands, "HOME": str(tmp_path), "PYTHONUNBUFFERED": ""}
    more = {"capture_output": True, "text": True, **more}
    return subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=env, timeout=120, check=False, **more
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_streams_that_a_shell_has_closed_leave_the_exit_code(tmp_path, closed):
    """Of every command: see test_edges."""
    result = bash(f"$NIELS config show {closed}", tmp_path)
    assert result.returncode == 0
    assert "Traceback" not in result.stderr
    assert bool(result.stdout) == (not closed.startswith(">"))


EVIL = "e\x1b]0;owned\x07\x9b2J.pt"


@pytest.mark.parametrize(
    "words",
    [
        ["niels_gpt", "checkpoint", "info", "good.pt"],  # its settings hold the same
        ["niels_gpt", "checkpoint", "verify", EVIL],
        ["niels_gpt", "checkpoint", "info", "good.pt", EVIL],
        ["niels_gpt", "train", "--config", EVIL],
        ["niels_gpt.train", "--config", "smoke", EVIL],
        ["niels_gpt", EVIL],
        ["niels_gpt", f"--{EVIL}"],
    ],
    ids=lambda words: "-".join(words[1:-1]),
)
def test_no_control_character_of_a_name_or_a_file_reaches_a_terminal(tmp_path, words):
    (tmp_path / EVIL).write_bytes(b"x")
    torch.save({**random_payload(), "train_cfg": {"x": EVIL}}, tmp_path / "good.pt")
    screen, theirs = pty.openpty()
    command = [sys.executable, "-m", *words]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
        while piece := os.read(screen, 4096):
            seen += piece
    os.close(screen)
    assert process.wait() in (0, 1, 2)
    text = seen.decode().replace("\r\n", "\n")
    assert "owned" in text
    assert all(c.isprintable() or c == "\n" for c in text), ascii(text)


@FULL
@pytest.mark.parametrize(
    "words",
    [
        *("$NIELS --help", "$NIELS config show", "$NIELS config show --json", "$NIELS data --help"),
        *("$NIELS --version", "$NIELS data info --help", "$NIELS train -h", "$TRAIN --help"),
        "_NIELS_GPT_COMPLETE=bash_source $NIELS",
        "_NIELS_GPT_COMPLETE=bash_complete COMP_WORDS=niels-gpt COMP_CWORD=1 $NIELS",
    ],
)
def test_a_full_disk_is_one_message_and_code_1(tmp_path, words):
    result = bash(f"{words} > /dev/full", tmp_path)
    assert result.returncode == 1
    assert result.stderr == "error: [Errno 28] No space left on device\n"


@FULL
def test_messages_that_cannot_be_written_leave_the_result(tmp_path):
    result = bash("$NIELS data info 2> /dev/full", tmp_path)
    assert (result.returncode, "primer" in result.stdout) == (0, True)


@pytest.mark.parametrize("words", ["config show", "data --help"])
def test_a_reader_that_goes_away_has_what_it_wanted(tmp_path, words):
    result = bash(f"$NIELS {words} | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("words", [["config", "show"], ["plot"], ["checkpoint", "verify", "a"]])
def test_ctrl_c_is_code_130_in_every_command(niels, monkeypatch, words):
    def interrupt(*args, **more):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("niels_gpt.cli.config.resolve", interrupt)
    monkeypatch.setattr("niels_gpt.analysis.plot.check_paths", interrupt)
    monkeypatch.setattr("niels_gpt.analysis.checkpoint_report.checkpoints_in", interrupt)
    result = niels(*words)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "\n")


def test_a_message_takes_the_place_of_the_live_line(monkeypatch, capsys):
    monkeypatch.setattr(Console, "is_live", True)
    console = Console()
    console.progress("row")(1, 1200)
    console.progress("row")(2, 1200)
    console.tell("a", "b")
    console.say("c")
    out, err = capsys.readouterr()
    assert err == "row 1 of 1,200\r\x1b[Krow 2 of 1,200\r\x1b[Knote: a\nnote: b\n"
    assert out == "c\n"


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (80, "step 200/20000  loss 1.2345  1:23:45 left  1,234 bytes/s  lr 0.0003"),
        (60, "step 200/20000  loss 1.2345  1:23:45 left  1,234 bytes/s"),
        (42, "step 200/20000  loss 1.2345  1:23:45 left"),
        (41, "step 200/20000  loss 1.2345"),
        (10, "step 200/"),
        (0, "step 200/20000  loss 1.2345  1:23:45 left  1,234 bytes/s  lr 0.0003"),  # unknown
    ],
)
def test_the_live_line_stays_on_one_row_of_the_terminal(monkeypatch, columns, shown):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w") as terminal, open(ours, "rb", 0) as screen:
        monkeypatch.setattr(sys, "stderr", terminal)
        Console().show("step 200/20000  loss 1.2345  1:23:45 left  1,234 bytes/s  lr 0.0003")
        assert screen.read(200).decode() == shown


def test_without_a_terminal_there_is_no_live_line(capsys):
    Console().show("step 1")
    assert capsys.readouterr() == ("", "")


def test_json_has_null_for_what_is_not_finite():
    pair = namedtuple("pair", "a b")
    assert to_json([pair(1, float("nan")), {"c": (float("inf"), "é")}]).split() == [
        *("[", "{", '"a":', "1,", '"b":', "null", "},"),
        *("{", '"c":', "[", "null,", '"é"', "]", "}", "]"),
    ]


def test_a_system_error_is_told_with_its_path():
    assert describe(OSError(28, "No space left", "x.pt")) == "x.pt: No space left (errno 28)"
    assert describe(ValueError("H=3")) == "H=3"


@pytest.mark.parametrize(
    ("stdout", "is_read"), [("/dev/null", False), ("out.txt", True), (None, True), (">&-", False)]
)
def test_it_is_known_whether_anyone_can_read_the_output(tmp_path, stdout, is_read):
    code = (
        "import sys; from niels_gpt.cli.shared.output import Console, process\n"
        "with process(): print(Console().is_read, file=sys.stderr)"
    )
    where = {None: "| cat", ">&-": ">&-"}.get(stdout, f"> {stdout}")
    command = f'{sys.executable} -W ignore -c "{code}" {where}'
    result = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stderr.split() == [str(is_read)]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set, as `clock.now`."""
    clock = type("Clock", (), {"now": 0.0})
    monkeypatch.setattr(output.time, "monotonic", lambda: clock.now)
    return clock


def test_on_a_terminal_what_takes_long_is_shown_with_its_seconds(monkeypatch, capsys, clock):
    monkeypatch.setattr(Console, "is_live", True)
    task = Task(Console(), "reading the text")
    for clock.now in (0.5, 1.0, 2.0, 3.0):
        task.tick()
    task.becomes("measuring")
    clock.now = 5.0
    task.tick()
    shown = capsys.readouterr().err.replace("\r\x1b[K", "|")
    assert shown == (
        "reading the text  1 s|reading the text  2 s|reading the text  3 s|measuring  2 s"
    )


def test_what_others_say_comes_first(monkeypatch, capsys, clock):
    monkeypatch.setattr(Console, "is_live", True)
    console = Console()
    task = Task(console, "reading the text")
    for second in range(1, 9):
        clock.now = float(second)
        console.progress("row")(second, 20)
        clock.now += 0.5
        task.tick()
    assert "reading" not in capsys.readouterr().err


def test_a_task_leaves_no_thread_and_no_line(monkeypatch, capsys):
    monkeypatch.setattr(Console, "is_live", True)
    monkeypatch.setattr(output, "TICK", 0.0)
    shown = threading.Event()
    monkeypatch.setattr(Task, "tick", lambda task: shown.set())
    before = threading.active_count()
    with contextlib.suppress(KeyError), Console().busy("thinking"):
        assert shown.wait(60)
        raise KeyError
    assert threading.active_count() == before


def test_warnings_of_torch_are_not_for_the_user(tmp_path):
    code = (
        "import warnings; from niels_gpt.cli.shared.output import process\n"
        "with process():\n"
        "    import torch\n"
        "    for name in ('torch._inductor.x', 'torch', 'torchlike', 'niels_gpt.x'):\n"
        "        warnings.warn_explicit('from ' + name, UserWarning, 'file.py', 1, name)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    told = [line for line in result.stderr.splitlines() if "from " in line]
    assert told == [f"file.py:1: UserWarning: from {name}" for name in ("torchlike", "niels_gpt.x")]
