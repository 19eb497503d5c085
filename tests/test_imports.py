"""The layers: imports run downward, the maths stays apart from the world, importing does no work.

The order below is the picture in docs/architecture.md, from the bottom up.
"""

import ast
import graphlib
import json
import subprocess
import sys
from functools import cache

import pytest

from tests import ROOT

READERS = (
    "data.split data.text data.recipe data.roam data.documents data.primer data.python_docs "
    "data.wiki data.sources mix"
)
MATHS_ROOMS = "model optim state loss step eval"
# From the bottom up; a module is in the room of its folder.
ROOMS = f"""
    paths units rng device tokenizer chat_format batching files data config mix lr_schedule
    {MATHS_ROOMS}
    schema streams corpus checkpoint inference run analysis
    entries
""".split()
ENTRIES = {"", "train", "cli", "__main__"}

THE_WORLD = {
    *("click", "os", "pathlib", "io", "shutil", "tempfile", "json", "pickle"),
    *("time", "datetime", "logging", "warnings", "subprocess", "socket", "signal"),
}


@cache
def modules():
    """Return the parsed source of each module, by its name below the package ("" is the root)."""
    package = ROOT / "niels_gpt"
    names = {
        ".".join(file.relative_to(package).with_suffix("").parts): file
        for file in package.rglob("*.py")
    }
    return {
        name.removesuffix("__init__").removesuffix("."): ast.parse(file.read_text())
        for name, file in sorted(names.items())
    }


def imported(tree):
    """Return the full dotted names that a module imports anywhere, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tops(tree):
    """Return the packages that a module imports from."""
    return {name.split(".")[0] for name in imported(tree)}


@cache
def arrows():
    """Return the modules of the package that each of its modules imports."""

    def home(name):
        while name not in modules():
            name = name.rpartition(".")[0]
        return name

    return {
        module: {
            home(name.removeprefix("niels_gpt").removeprefix("."))
            for name in imported(tree)
            if name.split(".")[0] == "niels_gpt"
        }
        - {module}
        for module, tree in modules().items()
    }


def room(module):
    """Return the room of a module: its folder, or itself at the top."""
    first = module.split(".")[0]
    return "entries" if first in ENTRIES else first


MATHS = [m for m in modules() if room(m) in ("rng", "lr_schedule", *MATHS_ROOMS.split())]


def test_every_module_has_a_room_and_every_room_a_module():
    assert {room(module) for module in modules()} == set(ROOMS)
    assert len(set(ROOMS)) == len(ROOMS)


def test_the_reader_sees_arrows():
    assert arrows()["step"] >= {"loss", "optim", "state"}
    assert "run.launch" in arrows()["train"]  # inside a function
    assert "state" in arrows()[""]  # for the type checker only


@pytest.mark.parametrize("module", modules())
def test_imports_run_downward(module):
    below = set(ROOMS[: ROOMS.index(room(module)) + 1])
    assert {room(other) for other in arrows()[module]} <= below


def test_there_are_no_circles():
    graphlib.TopologicalSorter(arrows()).prepare()


@pytest.mark.parametrize("entry", sorted(ENTRIES - {""}))
def test_nothing_imports_an_entry_but_another_entry(entry):
    importers = {module for module in arrows() if entry in arrows()[module]}
    assert {m for m in importers if not m.startswith("cli.")} <= ENTRIES


def test_only_the_command_line_imports_commands():
    importers = {m for m in arrows() if any(a.startswith("cli") for a in arrows()[m])}
    assert {m for m in importers if not m.startswith("cli")} <= ENTRIES


def test_only_the_command_line_knows_click():
    knowing = {m for m, tree in modules().items() if "click" in tops(tree)}
    assert {m for m in knowing if not m.startswith("cli")} == {"train"}


@pytest.mark.parametrize("module", MATHS)
def test_the_maths_stays_apart_from_the_world(module):
    tree = modules()[module]
    assert not tops(tree) & THE_WORLD
    calls = {node.func.id for node in ast.walk(tree) if is_plain_call(node)}
    assert not calls & {"open", "print", "input", "exec", "eval", "hash", "id"}


def is_plain_call(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


@pytest.mark.parametrize("module", [m for m in modules() if room(m) == "model"])
def test_the_model_knows_no_optimizer_data_or_checkpoint(module):
    assert {room(other) for other in arrows()[module]} <= {"config", "rng", "model"}


@pytest.mark.parametrize(
    "module",
    f"files.strict_json config paths chat_format lr_schedule model.flops {READERS}".split(),
)
def test_some_modules_need_the_standard_library_only(module):
    assert tops(modules()[module]) <= {*sys.stdlib_module_names, "niels_gpt"}


def python(code, *arguments):
    """Run code in a new process at the root of the project; return what it printed."""
    command = [sys.executable, "-W", "ignore", "-B", "-c", code, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout


def test_what_has_to_start_fast_imports_no_torch():
    names = ["", *("config", "paths", "device", "lr_schedule", "chat_format", "cli", "train")]
    code = (
        "import sys, importlib\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'{name} imports torch')\n"
        "import niels_gpt; print(*niels_gpt.__all__, *dir(niels_gpt))\n"
        "if 'torch' in sys.modules: sys.exit('dir imports torch')\n"
    )
    printed = python(code, *(f"niels_gpt.{name}".rstrip(".") for name in names))
    assert "train_step" in printed


IMPORT_EVERYTHING = """
import importlib, json, logging, os, random, signal, sys, threading, warnings
import torch, click, torch.func

writes = []

def watch(event, args):
    if event == "open" and isinstance(args[2], int):
        if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            writes.append(f"open {args[0]}")
    elif event in {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate",
                   "os.utime", "os.chmod", "os.putenv", "os.chdir", "subprocess.Popen",
                   "socket.connect", "os.fork", "signal.signal"}:
        writes.append(f"{event} {args}")

def world():
    return {
        "torch generator": torch.get_rng_state().tolist(),
        "python generator": repr(random.getstate()),
        "threads": (torch.get_num_threads(), threading.active_count()),
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "environment": dict(os.environ),
        "loggers": [str(h) for h in logging.getLogger().handlers],
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "warnings": [str(f) for f in warnings.filters],
    }

sys.addaudithook(watch)
before, changes = world(), []
for name in sys.argv[1:]:
    importlib.import_module(name)
    after = world()
    changes += [f"{name} changed {key}" for key in before if before[key] != after[key]]
    changes += [f"{name}: {write}" for write in writes]
    before = after
    writes.clear()
print(json.dumps(changes))
"""


def test_importing_any_module_does_no_work():
    names = [f"niels_gpt.{name}".rstrip(".") for name in modules() if name != "__main__"]
    assert json.loads(python(IMPORT_EVERYTHING, *names)) == []


def test_the_watch_sees_work(tmp_path):
    (tmp_path / "worker.py").write_text(
        "import random, torch, pathlib\n"
        "torch.rand(1); random.random()\n"
        "pathlib.Path(__file__).with_suffix('.txt').write_text('x')\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + IMPORT_EVERYTHING
    changes = " ".join(json.loads(python(code, "worker")))
    assert "torch generator" in changes
    assert "python generator" in changes
    assert "worker.txt" in changes


def test_the_functions_have_two_addresses():
    import niels_gpt
    import niels_gpt.train
    from niels_gpt.eval import evaluate
    from niels_gpt.state import make_state
    from niels_gpt.step import train_step

    for package in (niels_gpt, niels_gpt.train):
        assert package.make_state is make_state
        assert package.train_step is train_step
        assert package.evaluate is evaluate
    assert all(hasattr(niels_gpt, name) for name in niels_gpt.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = niels_gpt.no_such_name
