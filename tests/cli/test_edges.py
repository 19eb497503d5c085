"""Commands at the edges of a process: no temporary folder, closed streams, Ctrl-C."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from niels_gpt.cli import main
from niels_gpt.config import OPTIMIZERS
from tests.trained import save_lively

NO_TEMPORARY_FOLDER = """
import sys, tempfile
tempfile._candidate_tempdir_list = lambda: ["/nonexistent"]
from niels_gpt.cli import main
try:
    main(prog_name="niels-gpt")
finally:
    compiler = sorted({"torch._dynamo", "torch._inductor"} & set(sys.modules))
    sys.stderr.write("".join(f"imported {name}\\n" for name in compiler))
"""


CONFIG = {
    "model": {"T": 16, "C": 8, "L": 1, "H": 2, "d_ff": 8},
    "train": {
        **{"B": 2, "total_steps": 2, "warmup_steps": 0, "log_every": 1},
        **{"eval_every": 2, "eval_steps": 1, "ckpt_every": 1},
    },
}

PLACES = "--wiki texts/wiki --roam texts/notes"
CHEAP = {  # a short invocation of every command, in a folder with a finished run
    "chat": ["--ckpt run/best.pt --max-bytes 3 --device cpu"],
    "checkpoint": [
        "info run/best.pt",
        "verify run",
        "diff run/step_0000001.pt run/best.pt",
        "export run/best.pt out/model.safetensors --force",
    ],
    "config": ["show --config config.json"],
    "data": [f"{part} --config config.json {PLACES}" for part in ("info", "build", "sample")],
    "evaluate": [f"--ckpt run/best.pt --full --source roam {PLACES} --device cpu"],
    "inspect": [f"--ckpt run/best.pt --only noise --batches 2 {PLACES}"],
    "plot": ["run --table", "run --out out/loss.svg"],
    "replay": [
        f"--from run/step_0000001.pt --to run/step_0000002.pt {PLACES}",
        f"--from run --step 2 {PLACES}",
    ],
    "sample": ["--ckpt run/best.pt --prompt - --max-bytes 3 --device cpu"],
    "selfcheck": ["--device cpu"],
    "sweep": [f"--config config.json --lr 1e-3,1e-2 --together {PLACES}"],
    "train": [f"--config config.json --out again {PLACES} --device cpu"],
}
INVOCATIONS = [f"{name} {words}" for name, each in CHEAP.items() for words in each]
SLOW = ("selfcheck", "sweep")


@pytest.fixture(scope="module")
def place(tmp_path_factory, texts):
    """A folder with a config, texts, a finished run in `run`, and an empty `out`."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "texts").symlink_to(texts)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "out").mkdir()
    words = f"train --config config.json --out run {PLACES} --device cpu"
    result = subprocess.run(
        [sys.executable, "-m", "niels_gpt", *words.split()], cwd=folder, capture_output=True
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_every_command_has_an_invocation_here():
    assert sorted(CHEAP) == main.list_commands(None)


# --- closed streams ----------------------------------------------------------------------------

WITH_CLOSED_STREAMS = """
import json, os, sys, traceback
import torch
from niels_gpt.cli import main

def child(words, closed, name):
    nothing = os.open(os.devnull, os.O_RDONLY)
    out, err = (os.open(f"{name}.{end}", os.O_CREAT | os.O_WRONLY) for end in ("out", "err"))
    for descriptor, number in ((nothing, 0), (out, 1), (err, 2)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    for number in closed:  # what Python finds at its start
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    try:
        main(words.split(), prog_name="niels-gpt")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        with open(f"{name}.traceback", "w") as file:
            traceback.print_exc(file=file)
    return 99

codes = []
for number, (words, closed) in enumerate(json.loads(sys.argv[1])):
    if (pid := os.fork()) == 0:
        code = 98
        try:
            code = child(words, closed, f"out/{number}")
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        finally:
            os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(codes))
"""


def test_closed_streams_change_no_exit_code_and_no_other_output(place):
    """Of every command: none closed, all, and one, in turn.

    One process forks them all, because importing torch takes a second.
    """
    words = [*INVOCATIONS, "--version", "--help", "sample --help", "checkpoint info absent.pt"]
    runs = [
        (line, closed)
        for line, one in zip(words, itertools.cycle((0, 1, 2)))
        for closed in ([0, 1, 2], [], [one])
        if len(closed) == 3 or not line.startswith(SLOW)
    ]
    result = subprocess.run(
        [sys.executable, "-c", WITH_CLOSED_STREAMS, json.dumps(runs)],
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    codes = json.loads(result.stdout)
    for number, (line, closed) in enumerate(runs):
        traces = [file.read_text() for file in (place / "out").glob(f"{number}.traceback")]
        seen = "\n".join([*traces, *printed(place, number)])
        assert codes[number] == (2 if "absent" in line else 0), (line, closed, seen)
        for stream, text in enumerate(printed(place, number)):
            if stream + 1 in closed:
                assert text == "", (line, closed)
            else:
                whole = printed(place, runs.index((line, [])))
                assert text == whole[stream], (line, closed)


def printed(place, number):
    """Return stdout and stderr of a run without its times and subfolders."""
    texts = [(place / "out" / f"{number}.{end}").read_text() for end in ("out", "err")]
    texts[0] = re.sub(r"(?m)^moved .*\n|[\d,]+ bytes/s|\d+:\d\d|built now|cached", "", texts[0])
    return [texts[0], re.sub(r"[\d.,]+(e-\d+)? (of|s|min|bytes/s|MB|kB)\b.*|ratio.*", "", texts[1])]


# --- Ctrl-C ------------------------------------------------------------------------------------

presses: list[object] = []  # tells at which event of the interpreter Ctrl-C is pressed


def press(event, args):
    if presses and presses[0](event, args):
        presses.clear()
        signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def audited():
    """Press Ctrl-C at the first event for which a function is true; the hook stays for good."""
    sys.addaudithook(press)
    return presses


@pytest.fixture
def ctrl_c(audited):
    """Return the list for the function that says when; a test that fails leaves none in it.

    A run that was stopped before, in this process, ignores further signals for a while.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield audited
    signal.signal(signal.SIGINT, before)
    audited.clear()


def opens_input(event, args):
    return event == "open" and re.search(r"(best|step_\d+)\.pt$|\.json$|\.jsonl$", str(args[0]))


@pytest.mark.parametrize("line", [line for line in INVOCATIONS if "selfcheck" not in line])
def test_ctrl_c_is_code_130_in_every_command(niels, place, monkeypatch, ctrl_c, line):
    monkeypatch.chdir(place)
    ctrl_c.append(opens_input)
    result = niels(*line.split())
    assert not ctrl_c, f"it was not pressed: {result.output}"
    assert result.exit_code == 130, result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("line", "old", "extra"),
    [
        ("plot run --out out/loss.svg", "out/loss.svg", "matplotlib"),
        (
            "checkpoint export run/best.pt out/model.safetensors --force",
            "out/model.safetensors",
            "safetensors",
        ),
        (
            f"sweep --config config.json --lr 1e-3 {PLACES} --picture out/sweep.svg",
            "out/sweep.svg",
            "matplotlib",
        ),
    ],
)
@pytest.mark.parametrize("when", ["open", "os.rename"])
def test_ctrl_c_leaves_nothing_half_written(
    niels, place, monkeypatch, ctrl_c, line, old, extra, when
):
    pytest.importorskip(extra)
    monkeypatch.chdir(place)
    name = old.rpartition("/")[2]
    (place / old).write_text("the old one")
    before = sorted((place / "out").iterdir())
    ctrl_c.append(lambda event, args: event == when and name in str(args[0]))
    result = niels(*line.split())
    assert not ctrl_c, f"it was not pressed: {result.output}"
    assert result.exit_code == 130, result.output
    assert sorted((place / "out").iterdir()) == before
    assert (place / old).read_text() == "the old one"


# --- names that begin a line of their own --------------------------------------------------------

EVIL = "a\ngood  fake\x1b[2J\r\u2028note: fake"  # as a name of a file or folder


@pytest.mark.parametrize("line", INVOCATIONS)
def test_no_name_fakes_a_line(niels, place, tmp_path, monkeypatch, line):
    """Each path of a command in turn: absent, and then a copy of what it should be."""
    if line.endswith(".svg"):
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(place)
    words = line.split()
    for i, word in enumerate(words):
        if not re.search(r"[/.]|^run$|^again$", word):
            continue
        for number, there in enumerate((False, True)):
            path = tmp_path / f"{i} {number} {EVIL}{Path(word).suffix}"
            if there and Path(word).is_dir():
                shutil.copytree(word, path)
            elif there and Path(word).exists():
                shutil.copy(word, path)
            seen = niels(*words[:i], path, *words[i + 1 :]).output
            assert "fake" in seen or there, (word, seen)
            lines = [piece for text in seen.splitlines() for piece in re.split("[\r\u2028]", text)]
            assert not [text for text in lines if re.match("(good  |note: )?fake", text)], seen


def test_no_note_fakes_a_line(niels, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    notes = tmp_path / f"notes {EVIL}"
    shutil.copytree("texts/notes", notes)
    (notes / f"{EVIL}.md").symlink_to("nowhere")
    (notes / f"b{EVIL}.md").write_bytes(b"not \xff UTF-8")
    for command in ("data info", "data build", f"train --device cpu --out {tmp_path}/evil"):
        where = ["--config", "config.json", "--wiki", "texts/wiki", "--roam", notes]
        result = niels(*command.split(), *where)
        assert result.exit_code == 0, result.output
        assert "fake" in result.output
        assert not re.search("(?m)^(good  |note: )?fake", result.output.replace("\u2028", "\n"))


# --- the processors of a container ---------------------------------------------------------------

COMPUTING = [f"{name} {CHEAP[name][0]}" for name in ("evaluate", "inspect", "sweep", "train")]


@pytest.mark.parametrize("line", COMPUTING)
def test_a_command_that_computes_has_no_more_threads_than_processors(
    niels, place, monkeypatch, line
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("niels_gpt.device.available_processors", lambda: 1)
    torch.set_num_threads(2)
    monkeypatch.chdir(place)
    assert niels(*line.split()).exit_code == 0
    assert torch.get_num_threads() == 1


# --- no temporary folder -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return save_lively(tmp_path_factory.mktemp("run") / "best.pt")


@pytest.mark.parametrize(
    "words",
    [
        "sample --ckpt best.pt --max-bytes 3",
        "sample --ckpt best.pt --max-bytes 3 -n 2",
        "chat --ckpt best.pt --max-bytes 3 --message Hi",
        "evaluate --ckpt best.pt --text best.pt --steps 1",
        "evaluate --ckpt best.pt --text text.txt --full",
        "checkpoint info best.pt",
        "checkpoint verify best.pt",
        "checkpoint diff best.pt best.pt",
        "checkpoint export best.pt model.safetensors --force",
    ],
)
def test_using_a_model_needs_no_temporary_folder_and_no_compiler(ckpt, words):
    (ckpt.parent / "text.txt").write_text("A short text of a few words. " * 9)
    assert "imported" not in without_temporary_folder(words, ckpt.parent)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_needs_no_temporary_folder(place, optimizer):
    """Torch's gradients do import the compiler; that alone needs none."""
    words = f"train --config config.json {PLACES} --device cpu --set train.optimizer={optimizer}"
    without_temporary_folder(f"{words} --out out/{optimizer}", place)
    assert (place / "out" / optimizer / "best.pt").exists()


def without_temporary_folder(words, folder):
    result = subprocess.run(
        [sys.executable, "-c", NO_TEMPORARY_FOLDER, *words.split()],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr
