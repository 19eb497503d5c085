"""`niels-gpt chat`: one message, lines from a pipe, and a person at a terminal."""

import contextlib
import os
import pty
import readline
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from niels_gpt.cli import main
from tests.trained import save_lively


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return save_lively(tmp_path_factory.mktemp("run") / "best.pt")


def chat(ckpt, *args, stdin=None):
    args = ["chat", "--ckpt", str(ckpt), "--max-bytes", "20", *args]
    return CliRunner().invoke(main, args, input=stdin)


def test_one_message_gets_one_reply(ckpt):
    result = chat(ckpt, "--message", "Hi")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    assert result.stderr == ""
    assert chat(ckpt, "--message", "Hi").stdout == result.stdout
    assert chat(ckpt, "--message", "Hi", "--seed", "5").stdout != result.stdout
    assert chat(ckpt, "--message", "Hi", "--system", "Be kind.").stdout != result.stdout


def test_lines_from_a_pipe_are_messages(ckpt):
    result = chat(ckpt, stdin="Hi\n\n/reset\nHi\n/exit\nnever\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == chat(ckpt, "--message", "Hi").stdout * 2
    assert result.stderr == "note: conversation forgotten\n"


def test_a_model_that_has_read_no_dialogue_says_how_to_teach_it(tmp_path):
    """The other tests' model is of the default mix, which has some."""
    path = save_lively(tmp_path / "best.pt", p_train={"wiki": 1.0})
    note = chat(path, "--message", "Hi").stderr
    assert note.startswith("note: trained without dialogues")
    command = f"niels-gpt train --config chat --from {path} --out {tmp_path / 'chat'}"
    assert note.endswith(f": {command}\n")


def test_what_is_left_out_is_told_on_stderr(ckpt):
    result = chat(ckpt, "--message", "a" * 100)
    assert "note: the context of 64 bytes is full: only the last 54 of" in result.stderr


def test_text_that_is_not_utf8_is_no_obstacle(ckpt):
    result = chat(ckpt, stdin=b"caf\xe9\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == chat(ckpt, "--message", "caf\ufffd").stdout
    assert result.stdout == chat(ckpt, "--message", "caf\udce9").stdout


@pytest.mark.parametrize("args", [["--temperature", "-1"], ["--top-p", "2"], ["--device", "tpu"]])
def test_bad_options_are_refused(ckpt, args):
    result = chat(ckpt, *args, stdin="Hi\n")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert args[1] in result.stderr


def test_a_missing_checkpoint_is_refused_by_name(tmp_path):
    result = chat(tmp_path / "none.pt")
    assert result.exit_code == 2
    assert "none.pt" in result.stderr


# --- at a terminal -----------------------------------------------------------------------------


GREETING = b"""\
note: /help lists the commands, Ctrl-D ends
note: the context of 64 bytes is too short for two turns: the model will see little or nothing of \
the conversation before each message
"""


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, ckpt, max_bytes=9):
        self.screen, theirs = pty.openpty()
        command = [sys.executable, "-m", "niels_gpt", "chat", "--ckpt", str(ckpt)]
        self.process = subprocess.Popen(
            [*command, "--max-bytes", str(max_bytes)],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb", "INPUTRC": os.devnull},
        )
        os.close(theirs)
        self.seen = b""

    def until(self, text):
        """Read the screen up to this text and return what came with it."""
        while text not in self.seen:
            more = os.read(self.screen, 1024)  # of a chat that has ended: an error, or nothing
            assert more, self.seen
            self.seen += more
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, keys):
        os.write(self.screen, keys)

    def interrupt(self):
        """Type Ctrl-C, and again if it was missed.

        One that comes after the prompt and before readline waits is seen with the next key only.
        """
        while self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)

    def end(self):
        errors = self.process.communicate()[1]
        os.close(self.screen)
        return self.process.returncode, errors


@pytest.mark.skipif("libedit" in (readline.__doc__ or ""), reason="needs GNU readline")
def test_a_person_types_recalls_a_line_and_leaves_with_ctrl_d(ckpt):
    terminal = Terminal(ckpt)
    terminal.until(b"> ")
    terminal.type(b"/seed 77\r")
    terminal.until(b"> ")
    terminal.type(b"\x1b[A\r")  # the arrow up
    assert b"/seed 77" in terminal.until(b"> ")
    terminal.type(b"\x04")
    code, errors = terminal.end()
    assert code == 0
    assert errors == GREETING + b"note: seed 77\nnote: seed 77\n\n"


def test_ctrl_c_leaves_with_130(ckpt):
    terminal = Terminal(ckpt)
    terminal.until(b"> ")
    terminal.interrupt()
    code, errors = terminal.end()
    assert code == 130
    assert errors.strip() == GREETING.strip()


def test_ctrl_c_in_a_reply_stops_it_and_keeps_the_conversation(ckpt, tmp_path):
    terminal = Terminal(ckpt, max_bytes=10**9)
    terminal.until(b"> ")
    terminal.type(b"Hi\r")
    terminal.until(b"Hi")
    for _ in range(50):  # so the reply has begun
        os.read(terminal.screen, 1024)
    terminal.process.send_signal(signal.SIGINT)
    terminal.until(b"> ")
    terminal.type(f"/save {tmp_path / 'talk.txt'}\r".encode())
    terminal.until(b"talk.txt")
    terminal.until(b"> ")
    terminal.interrupt()
    code, errors = terminal.end()
    assert code == 130
    assert b"note: reply stopped; Ctrl-C at the prompt leaves\n" in errors
    assert (tmp_path / "talk.txt").read_text().startswith("user: Hi\nassistant: ")


def test_ctrl_c_ends_a_single_message_with_130(ckpt):
    command = [sys.executable, "-m", "niels_gpt", "chat", "--ckpt", str(ckpt), "--message", "Hi"]
    command += ["--max-bytes", str(10**9)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.read(20)
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130


def test_the_terminal_is_shown_no_control_characters(ckpt):
    terminal = Terminal(ckpt)
    terminal.until(b"> ")
    terminal.type(b"Hi\r")
    terminal.until(b"Hi")
    reply = terminal.until(b"> ").decode()
    terminal.type(b"/exit\r")
    assert terminal.end()[0] == 0
    assert all(c.isprintable() or c in "\r\n\t" for c in reply.replace("\x1b[?2004l", ""))
