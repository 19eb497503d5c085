"""One hypothesis profile for all, and a way to run the commands as a user does."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, settings

from niels_gpt import paths
from niels_gpt.cli import main

settings.register_profile(
    "niels_gpt",
    deadline=None,  # time never decides a test
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("niels_gpt")

# A program inherits ignored signals (nohup ignores SIGHUP, a shell's background jobs SIGINT), but
# not handled ones: with a handler here, the commands under test start like those of a user.
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda number, frame: None)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restore the thread count, which a command sets for its whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def own_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root of the program without text of the user's; its cache serves all tests."""
    return tmp_path_factory.mktemp("root")


@pytest.fixture(autouse=True)
def no_text_of_the_checkouts_own(own_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read no notes and no wiki text that somebody has put into the checkout; write no cache."""
    monkeypatch.setattr(paths, "REPO_ROOT", own_root)
    monkeypatch.setattr(paths, "ROAM_DIR", own_root / ".roam-data")


@pytest.fixture
def niels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `niels-gpt ARGS` in this process, with an empty folder as the current one."""
    monkeypatch.chdir(tmp_path)
    return lambda *args, **more: CliRunner().invoke(main, [*map(str, args)], **more)


@pytest.fixture
def niels_process(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m niels_gpt ARGS` as a process of its own, with nothing in its HOME."""

    def run(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "niels_gpt", *map(str, args)],
            cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path), "COLUMNS": "100", **env},
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wiki and notes of generated text."""
    root = tmp_path_factory.mktemp("texts")
    (root / "wiki").mkdir()
    sentences = [f"The {n}th sentence tells of {n * n % 97} things.\n" for n in range(900)]
    (root / "wiki" / "train.txt").write_text("".join(sentences[:800]))
    (root / "wiki" / "val.txt").write_text("".join(sentences[800:]))
    for n in range(12):
        note = root / "notes" / f"folder {n % 3} \N{SEEDLING}" / f"note {n}.md"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"# Note {n}\r\n\r\n" + f"- item {n}\r\n" * 40, newline="")
    return root
