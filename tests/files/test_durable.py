"""Durable files: complete or absent under every failure; one writer per folder."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.files import durable
from niels_gpt.files.durable import (
    FolderInUseError,
    append_bytes,
    lock_folder,
    make_folder,
    remove_temporaries,
    set_aside,
    sync_file,
    write_durably,
)
from tests import ROOT

CALLS = ("open", "write", "fsync", "rename", "close")


@pytest.fixture(autouse=True)
def flush_by_fsync(monkeypatch):
    """Let macOS flush by fsync as Linux does: tests watch that call, and fail it."""
    monkeypatch.delattr(durable.fcntl, "F_FULLFSYNC", raising=False)


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def run_python(program: str, *args: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)


@given(data=st.binary(max_size=300), old=st.none() | st.binary(max_size=50))
def test_every_name_holds_the_data(tmp_path, data, old):
    paths = [tmp_path / "b", tmp_path / "a"]
    if old is not None:
        paths[0].write_bytes(old)
    write_durably(paths, memoryview(data))
    assert [path.read_bytes() for path in paths] == [data, data]
    assert names_in(tmp_path) == ["a", "b"]


def test_each_name_is_durable_before_the_next_is_begun(tmp_path, monkeypatch):
    log = []

    def logged(name, inode_of):
        real = getattr(os, name)

        def call(*args, **kwargs):
            if name == "rename":
                log.append((name, os.stat(args[0]).st_ino, Path(args[1]).name))
                return real(*args)
            result = real(*args, **kwargs)
            log.append((name, inode_of(args)))
            return result

        monkeypatch.setattr(os, name, call)

    logged("write", lambda args: os.fstat(args[0]).st_ino)
    logged("fsync", lambda args: os.fstat(args[0]).st_ino)
    logged("rename", None)
    write_durably([tmp_path / "first", tmp_path / "second"], b"data")
    folder = tmp_path.stat().st_ino
    expected = []
    for name in ("first", "second"):
        inode = (tmp_path / name).stat().st_ino
        expected += [("write", inode), ("fsync", inode), ("rename", inode, name), ("fsync", folder)]
    assert log == expected


@given(data=st.binary(min_size=1, max_size=100), most=st.integers(1, 7))
def test_short_writes_lose_nothing(tmp_path, data, most):
    real = os.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", lambda fd, rest: real(fd, rest[:most]))
        write_durably([tmp_path / "a"], data)
        append_bytes(tmp_path / "log", data)
    assert (tmp_path / "a").read_bytes() == data
    assert (tmp_path / "log").read_bytes() == data
    (tmp_path / "log").unlink()


def test_a_write_that_makes_no_progress_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda fd, rest: 0)
    with pytest.raises(OSError, match="none of the bytes") as caught:
        write_durably([tmp_path / "a"], b"data")
    assert caught.value.errno == errno.EIO
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EINTR])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize(
    ("call", "nth"), [(call, nth) for call in CALLS for nth in (1, 2, 3, 4)], ids=str
)
def test_an_error_anywhere_leaves_whole_files(tmp_path, call, nth, code, existing):
    """Two names are written: fail the nth of their calls of one kind, then look around."""
    one, two = tmp_path / "one", tmp_path / "two"
    if existing:
        for path in (one, two):
            path.write_bytes(b"old")
    real, count = getattr(os, call), 0

    def failing(*args, **kwargs):
        nonlocal count
        count += 1
        if count == nth:
            if call == "close":
                real(*args)
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, failing)
        try:
            write_durably([one, two], b"new content")
            error = None
        except OSError as caught:
            error = caught
    if count < nth:
        assert error is None
        assert one.read_bytes() == two.read_bytes() == b"new content"
        return
    assert error is not None
    assert error.errno == code
    assert error.filename in {str(one), str(two), str(tmp_path)}
    old = b"old" if existing else None
    now = [path.read_bytes() if path.exists() else None for path in (one, two)]
    assert now in ([old, old], [b"new content", old], [b"new content", b"new content"])
    assert set(names_in(tmp_path)) <= {"one", "two"}
    write_durably([one, two], b"the next save")
    assert one.read_bytes() == two.read_bytes() == b"the next save"


def test_an_interrupt_leaves_no_temporary(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")

    def interrupted(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_durably([tmp_path / "a"], b"new")
    assert names_in(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    real = os.fsync

    def no_folders(fd):
        if os.path.isdir(f"/dev/fd/{fd}") or os.fstat(fd).st_ino == tmp_path.stat().st_ino:
            raise OSError(errno.EINVAL, "Invalid argument")
        real(fd)

    monkeypatch.setattr(os, "fsync", no_folders)
    write_durably([tmp_path / "a"], b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_f_fullfsync_is_used_where_there_is_one_and_fsync_where_it_fails(tmp_path, monkeypatch):
    """The call of macOS, imitated: 1 stands for F_FULLFSYNC, on Linux F_GETFD, which succeeds."""
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), real(fd)))
    monkeypatch.setattr(durable.fcntl, "F_FULLFSYNC", durable.fcntl.F_GETFD, raising=False)
    write_durably([tmp_path / "a"], b"new")
    assert synced == []
    monkeypatch.setattr(durable.fcntl, "F_FULLFSYNC", 10**6)  # unknown to this system: EINVAL
    write_durably([tmp_path / "a"], b"newer")
    assert len(synced) == 2
    assert (tmp_path / "a").read_bytes() == b"newer"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_drive_that_fails_to_flush_is_an_error(tmp_path, monkeypatch, number):
    (tmp_path / "a").write_bytes(b"old")

    def failing(fd, command):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(durable.fcntl, "F_FULLFSYNC", 51, raising=False)  # macOS's own number
    monkeypatch.setattr(durable.fcntl, "fcntl", failing)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write_durably([tmp_path / "a"], b"new")
    assert caught.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names_in(tmp_path) == ["a"]


def test_a_missing_folder_and_a_folder_in_the_way_are_named(tmp_path):
    missing = tmp_path / "no" / "a"
    with pytest.raises(FileNotFoundError) as caught:
        write_durably([missing], b"")
    assert caught.value.filename == str(missing)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught_too:
        write_durably([tmp_path / "folder"], b"")
    assert caught_too.value.filename == str(tmp_path / "folder")
    assert names_in(tmp_path) == ["folder"]


def test_append_adds_to_the_end_and_sync_needs_the_file(tmp_path):
    log = tmp_path / "log"
    append_bytes(log, b"one\n")
    append_bytes(log, b"two\n")
    sync_file(log)
    assert log.read_bytes() == b"one\ntwo\n"
    with pytest.raises(FileNotFoundError, match="absent"):
        sync_file(tmp_path / "absent")


def test_a_failed_append_is_taken_back(tmp_path, monkeypatch):
    log, real = tmp_path / "log", os.write
    log.write_bytes(b"one\n")

    def half_then_full(fd, rest):
        if len(rest) < 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, rest[:2])

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(OSError, match="No space left") as caught:
        append_bytes(log, b"two\n")
    assert caught.value.filename == str(log)
    assert log.read_bytes() == b"one\n"


def test_sync_file_syncs_the_file_and_its_folder(tmp_path, monkeypatch):
    (tmp_path / "log").write_bytes(b"x")
    synced, real = [], os.fsync

    def recorded(fd):
        synced.append(os.fstat(fd).st_ino)
        real(fd)

    monkeypatch.setattr(os, "fsync", recorded)
    sync_file(tmp_path / "log")
    assert synced == [(tmp_path / "log").stat().st_ino, tmp_path.stat().st_ino]


def test_make_folder_makes_parents_and_accepts_what_is_there(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        make_folder(tmp_path / "file" / "x")


@given(
    names=st.lists(st.sampled_from("abcdef"), unique=True),
    earlier=st.sets(st.integers(1, 4)),
)
def test_set_aside_moves_and_never_overwrites(tmp_path_factory, names, earlier):
    folder = tmp_path_factory.mktemp("out")
    for number in earlier:
        (folder / f"earlier-{number:03d}").mkdir()
        (folder / f"earlier-{number:03d}" / "a").write_text("from before")
    for name in "abcdef":
        (folder / name).write_text(f"content of {name}")
    aside = set_aside(folder, names)
    free = min(set(range(1, 6)) - earlier)
    assert aside == folder / f"earlier-{free:03d}"
    assert {p.name: p.read_text() for p in aside.iterdir()} == {n: f"content of {n}" for n in names}
    assert {p.name for p in folder.iterdir() if p.is_file()} == set("abcdef") - set(names)
    for number in earlier:
        assert (folder / f"earlier-{number:03d}" / "a").read_text() == "from before"


def test_set_aside_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        set_aside(tmp_path, ["latest.pt"])
    assert caught.value.filename == str(tmp_path / "latest.pt")
    assert names_in(tmp_path) == []


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from niels_gpt.files.durable import write_durably
os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
write_durably([Path(sys.argv[1])], b"new")
"""


def test_remove_temporaries_removes_what_a_killed_writer_left_and_nothing_else(tmp_path):
    mine = {".hidden.tmp", "notes.tmp", ".latest.pt.0123.tmp", "latest.pt"}
    for name in mine:
        (tmp_path / name).write_bytes(b"mine")
    writer = run_python(KILLED_WRITER, tmp_path / "latest.pt")
    assert writer.wait() == -signal.SIGKILL
    writer.stdout.close()
    left = set(names_in(tmp_path)) - mine
    assert len(left) == 1
    assert remove_temporaries(tmp_path) == sorted(left)
    assert set(names_in(tmp_path)) == mine
    assert (tmp_path / "latest.pt").read_bytes() == b"mine"


HOLDER = """
import sys
from pathlib import Path
from niels_gpt.files.durable import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_held_folder_is_refused_with_the_holders_pid_until_it_is_killed(tmp_path):
    holder = run_python(HOLDER, tmp_path, stdin=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(FolderInUseError, match=f"in use by process {holder.pid}") as caught:
        lock_folder(tmp_path).__enter__()
    assert caught.value.holder == holder.pid
    assert caught.value.filename == str(tmp_path)
    holder.kill()
    holder.communicate()
    with lock_folder(tmp_path):
        assert (tmp_path / durable.LOCK_NAME).read_text() == f"{os.getpid()}\n"
        with pytest.raises(FolderInUseError, match=str(os.getpid())):
            lock_folder(tmp_path).__enter__()
    with lock_folder(tmp_path):
        pass


HOLDER_WITH_CHILD = """
import os, signal, subprocess, sys
from pathlib import Path
from niels_gpt.files.durable import lock_folder
with lock_folder(Path(sys.argv[1])):
    child = subprocess.Popen(["cat"], stdin=0, stdout=subprocess.DEVNULL, close_fds=False)
    print(child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_children_of_a_killed_holder_do_not_keep_the_lock(tmp_path):
    holder = run_python(HOLDER_WITH_CHILD, tmp_path, stdin=subprocess.PIPE)
    child = int(holder.stdout.readline())
    assert holder.wait() == -signal.SIGKILL
    os.kill(child, 0)  # it still runs: its input is open
    with lock_folder(tmp_path):
        pass
    holder.communicate()


def test_a_lock_without_a_pid_yet_is_refused_without_one(tmp_path):
    with lock_folder(tmp_path):
        (tmp_path / durable.LOCK_NAME).write_text("")
        with pytest.raises(FolderInUseError, match="another process") as caught:
            lock_folder(tmp_path).__enter__()
    assert caught.value.holder is None


def test_the_module_needs_the_standard_library_only(tmp_path):
    program = (
        "import sys, niels_gpt.files.durable\nprint('torch' in sys.modules, 'click' in sys.modules)"
    )
    process = run_python(program)
    assert process.communicate()[0] == "False False\n"
