"""Every system call of a save killed or failed, by strace: whole files at every moment."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from niels_gpt.checkpoint import newest_good
from niels_gpt.files.durable import remove_temporaries
from niels_gpt.schema import write_payload
from tests import ROOT
from tests.checkpoints import random_payload
from tests.reliability.saver import BEGIN, END, sha256

ERRORS = ["ENOSPC", "EIO", "EDQUOT", "EROFS", "EINTR"]
FALLIBLE = {"openat", "write", "fsync", "rename", "renameat", "renameat2", "close"}
MEMORY = {"mmap", "munmap", "mremap", "brk", "madvise", "futex", "mprotect"}

# scenario -> what is in the folder before, what is saved
SCENARIOS = {
    "first": ([], ["latest.pt"]),
    "overwrite": (["latest.pt"], ["latest.pt"]),
    "best": (["best.pt", "latest.pt"], ["best.pt", "latest.pt"]),
    "final": (["best.pt", "latest.pt"], ["best.pt", "step_0000002.pt", "latest.pt"]),
}


class Call(NamedTuple):
    """The nth call of this name in the life of the program."""

    name: str
    nth: int


@cache
def strace_problem() -> str | None:
    """Return why strace cannot be used here, or None."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    run = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False)
    return None if run.returncode == 0 else f"strace cannot run here: {run.stderr!r}"


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> dict[int, Path]:
    """Return step -> a checkpoint of that step."""
    folder = tmp_path_factory.mktemp("content")
    files = {step: folder / f"{step}.pt" for step in (1, 2)}
    for step, file in files.items():
        write_payload([file], random_payload(step=step))
    return files


class Stage:
    """A folder in the state before a save, and the program that saves there."""

    def __init__(self, folder: Path, content: dict[int, Path], scenario: str) -> None:
        self.folder, self.content = folder, content
        self.before, self.names = SCENARIOS[scenario]
        self.old, self.new = (content[step].read_bytes() for step in (1, 2))

    def reset(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for name in self.before:
            (self.folder / name).write_bytes(self.old)

    def run(
        self, *wrapper: str, tries: int = 1, mode: str = "--bytes"
    ) -> subprocess.CompletedProcess:
        names = [str(self.folder / name) for name in self.names]
        program = [sys.executable, "-W", "ignore", "-m", "tests.reliability.saver", mode]
        return subprocess.run(
            [*wrapper, *program, str(tries), str(self.content[2]), *names],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    def traced(self, mode: str) -> list[tuple[Call, str]]:
        """Run once undisturbed and list the system calls between the marks, each with its line."""
        if strace_problem():
            pytest.skip(strace_problem())
        self.reset()
        log = self.folder.with_suffix(".log")
        assert self.run("strace", "-y", "-o", str(log), mode=mode).returncode == 0
        counts, inside, found = Counter(), False, []
        for line in log.read_text(errors="replace").splitlines():
            name = re.match(r"(\w+)\(", line)
            if name is None:
                continue
            counts[name[1]] += 1
            if BEGIN in line or END in line:
                inside = BEGIN in line
            elif inside:
                found.append((Call(name[1], counts[name[1]]), line))
        return found

    def calls(self) -> list[Call]:
        """List the system calls of saving the bytes, except those that manage memory."""
        found = [call for call, _ in self.traced("--bytes") if call.name not in MEMORY]
        names = {call.name for call in found}
        assert {"openat", "write", "fsync", "close"} <= names
        assert {"rename", "renameat", "renameat2"} & names
        return found

    def disturb(self, call: Call, what: str, tries: int = 1) -> subprocess.CompletedProcess:
        """Run with one fault, and make sure that it hit inside the save."""
        self.reset()
        log = self.folder.with_suffix(".log")
        run = self.run(
            *("strace", "-o", str(log), "-e", f"trace={call.name},access,faccessat,faccessat2"),
            *("-e", f"inject={call.name}:{what}:when={call.nth}"),
            tries=tries,
        )
        lines = log.read_text(errors="replace").splitlines()
        begin = [i for i, line in enumerate(lines) if BEGIN in line]
        hit = [i for i, line in enumerate(lines) if "INJECTED" in line or "SIGKILL" in line]
        assert begin
        assert hit
        assert begin[0] < hit[0], (call, lines)
        return run

    def names_done(self, digests: list[str | None] | None = None) -> int:
        """Return how many names are new, in the order of the save; all others must be old."""
        if digests is None:
            digests = [sha256(self.folder / name) for name in self.names]
        old, new = (hashlib.sha256(data).hexdigest() for data in (self.old, self.new))
        before = [old if name in self.before else None for name in self.names]
        done = digests.count(new)
        assert digests == [new] * done + before[done:]
        return done

    def check_loads(self, done: int) -> None:
        """Check that the folder has a good checkpoint unless the first save was cut short."""
        found, skipped = newest_good(self.folder)
        assert skipped == []
        assert (found is None) == (not self.before and done == 0)
        if found:
            assert found.step == (2 if done else 1)

    def others(self) -> set[str]:
        return set(os.listdir(self.folder)) - set(self.names) - set(self.before)


def scenarios(fast: str) -> pytest.MarkDecorator:
    """Parametrise with every scenario, one of them in the default run."""
    marks = {name: [] if name == fast else pytest.mark.reliability for name in SCENARIOS}
    return pytest.mark.parametrize(
        "scenario", [pytest.param(name, marks=marks[name]) for name in SCENARIOS]
    )


@pytest.mark.reliability
def test_a_checkpoint_is_saved_by_the_same_calls_as_its_bytes(tmp_path, content):
    """So what the other tests do to the save of bytes, they do to the save of a checkpoint."""
    stage = Stage(tmp_path / "out", content, "best")
    bytes_calls, checkpoint_calls = (
        [call.name for call, line in stage.traced(mode) if str(stage.folder) in line]
        for mode in ("--bytes", "--checkpoint")
    )
    assert len(bytes_calls) >= 14
    assert checkpoint_calls == bytes_calls
    assert stage.names_done() == 2


@scenarios(fast="best")
def test_kill_9_at_every_call(tmp_path, content, scenario, record_property):
    stage = Stage(tmp_path / "out", content, scenario)
    calls = stage.calls()
    reached = Counter()
    for call in calls:
        run = stage.disturb(call, "signal=SIGKILL")
        assert run.returncode in (-9, 137), (call, run)
        done = stage.names_done()
        stage.check_loads(done)
        reached[done] += 1
        left = stage.others()
        assert len(left) <= 1
        assert set(remove_temporaries(stage.folder)) == left
        assert stage.others() == set()
    assert set(reached) == set(range(len(stage.names) + 1))
    assert stage.run().returncode == 0
    assert stage.names_done() == len(stage.names)
    record_property("killed at", len(calls))
    print(f"{scenario}: killed at {len(calls)} calls, names done: {dict(reached)}")


@scenarios(fast="overwrite")
def test_every_errno_at_every_call(tmp_path, content, scenario, record_property):
    stage = Stage(tmp_path / "out", content, scenario)
    calls = [call for call in stage.calls() if call.name in FALLIBLE]
    errors = ["ENOSPC", "EINTR"] if scenario == "overwrite" else ERRORS
    outcomes = Counter()
    for call in calls:
        for name in errors:
            run = stage.disturb(call, f"error={name}", tries=2)
            assert run.returncode == 0, (call, name, run.stderr)
            (error, digests, others), (next_error, next_digests, next_others) = json.loads(
                run.stdout
            )
            done = stage.names_done(digests)
            assert set(others) <= set(stage.before)
            assert next_error is None
            assert stage.names_done(next_digests) == len(stage.names)
            assert set(next_others) <= set(stage.before)
            if error is None:
                assert name == "EINTR", (call, name)
                assert done == len(stage.names)
                outcomes["tried again"] += 1
                continue
            code, path = error
            assert code == getattr(errno, name)
            assert Path(path) in {stage.folder, *(stage.folder / n for n in stage.names)}
            outcomes["reported"] += 1
    assert outcomes["reported"] >= len(calls)
    record_property("errors", sum(outcomes.values()))
    print(f"{scenario}: {sum(outcomes.values())} errors, {dict(outcomes)}")


@pytest.mark.parametrize("kept", [0, 1, 1000])
def test_a_disk_that_lies_about_what_it_wrote_is_found_out(tmp_path, content, kept):
    """The first write claims more than it did: such a file is refused."""
    stage = Stage(tmp_path / "out", content, "best")
    write = next(call for call in stage.calls() if call.name == "write")
    run = stage.disturb(write, f"retval={len(stage.new) - kept}")
    assert run.returncode == 0
    found, skipped = newest_good(stage.folder)
    assert [path.name for path, _ in skipped] == ["best.pt"]
    assert found.path == stage.folder / "latest.pt"


def test_a_real_limit_on_the_size_of_files(tmp_path, content):
    """RLIMIT_FSIZE: the system writes the part that fits, then refuses."""
    stage = Stage(tmp_path / "out", content, "best")
    stage.reset()
    blocks = len(stage.new) // 2 // 512
    run = stage.run("sh", "-c", f'ulimit -f {blocks}; exec "$@"', "sh", tries=2)
    for error, digests, others in json.loads(run.stdout):
        assert error == [errno.EFBIG, str(stage.folder / "best.pt")]
        assert stage.names_done(digests) == 0
        assert others == []


def test_a_real_full_disk(tmp_path, content):
    """A tmpfs with room for the old files and half a new one; then the ballast goes."""
    stage = Stage(tmp_path / "disk" / "out", content, "best")
    disk, size = stage.folder.parent, 2 * len(stage.old) + 200_000
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        stage.reset()
        ballast = disk / "ballast"
        with open(ballast, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                file.truncate(max(0, file.tell() - len(stage.new) // 2))
        run = stage.run(tries=2)
        for error, digests, others in json.loads(run.stdout):
            assert error == [errno.ENOSPC, str(stage.folder / "best.pt")]
            assert stage.names_done(digests) == 0
            assert others == []
        stage.check_loads(0)
        ballast.unlink()
        assert json.loads(stage.run().stdout)[0][0] is None
        assert stage.names_done() == 2
        stage.check_loads(2)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
