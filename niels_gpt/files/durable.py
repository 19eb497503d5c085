"""Files that survive a power cut, and the lock that limits a folder to one writer.

Standard library only, POSIX only. A file is *durable* when both its bytes and its name survive a
power failure: the bytes need an fsync of the file, the name an fsync of the folder.
Every ``OSError`` raised here carries the errno and the path.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

LOCK_NAME = ".niels-gpt.lock"
_UNSUPPORTED = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY}  # network volumes
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


class FolderInUseError(OSError):
    """Another process holds the folder's lock; `holder` is its pid, None until it is written."""

    def __init__(self, folder: Path, holder: int | None) -> None:
        who = "another process" if holder is None else f"process {holder}"
        super().__init__(errno.EWOULDBLOCK, f"already in use by {who}", str(folder))
        self.holder = holder


def write_durably(paths: Sequence[Path], data: bytes | memoryview | Iterable[bytes]) -> None:
    """Write `data` under each name in turn; each name is durable before the next is started.

    An iterator of parts, which need not fit into memory, serves one name.

    A reader, or the next start after a kill or a power cut, finds under each name either the
    complete old or the complete new content. On an error, no temporary file is left, and the
    failing name and those after it keep their old content. If only the last fsync of the folder
    failed, the new content is in place, but a power cut may undo it.
    """
    for path in paths:
        _replace(path, data)


def append_bytes(path: Path, data: bytes) -> None:
    """Append to a file, creating it if needed; durable after `sync_file`. Failures are undone."""
    with _named(path):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with _closing(fd):
            size = os.fstat(fd).st_size
            try:
                _write_all(fd, data)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, size)
                raise


def sync_file(path: Path) -> None:
    """Make the content and the name of `path` durable."""
    with _named(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with _closing(fd):
            _flush(fd)
    _sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Create `folder` and its missing parents durably; do nothing if it exists."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:
        number = errno.ENOTDIR
        raise NotADirectoryError(number, os.strerror(number), str(folder)) from None
    _sync_folder(folder.parent)


def check_folder(folder: Path) -> None:
    """Raise the OSError that creating `folder`, or a file in it, would raise; write nothing.

    Only permissions are checked: a full disk, for example, shows only when writing.
    """
    nearest = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    number = 0
    if not nearest.is_dir():
        number = errno.ENOTDIR
    elif not os.access(nearest, os.W_OK | os.X_OK):
        number = errno.EACCES
    if number:
        raise OSError(number, os.strerror(number), str(nearest))


def set_aside(folder: Path, names: Iterable[str], *, copied: Collection[str] = ()) -> Path:
    """Move files of `folder` durably into a new subfolder ``earlier-NNN``; return the subfolder.

    Small files that are to be `copied` stay where they are too. Nothing is overwritten. If killed
    midway, each file is complete in one of the two places.
    """
    aside = _new_subfolder(folder)
    try:
        for name in names:
            with _named(folder / name):
                if name in copied:
                    write_durably([aside / name], (folder / name).read_bytes())
                else:
                    os.rename(folder / name, aside / name)
    except OSError:
        with contextlib.suppress(OSError):
            aside.rmdir()  # if nothing was moved
        raise
    _sync_folder(aside)
    _sync_folder(folder)
    return aside


def remove_temporaries(folder: Path) -> list[str]:
    """Remove temporary files left by killed writers, and return their names.

    The caller must hold the folder's lock: a writer at work would lose its temporary file and fail.
    """
    left = sorted(p.name for p in folder.iterdir() if _TEMPORARY.fullmatch(p.name))
    for name in left:
        (folder / name).unlink(missing_ok=True)
    return left


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; raise `FolderInUseError` at once if another process holds it.

    The lock (flock) ends with its holder, however that ends; the lock file stays and contains the
    pid of the holder. Child processes do not inherit the lock.
    """
    path = folder / LOCK_NAME
    with _named(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with _closing(fd):
        try:
            with _named(path):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUseError(folder, _read_pid(fd)) from None
        with _named(path):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(fd, 0)


def _replace(path: Path, data: bytes | memoryview | Iterable[bytes]) -> None:
    parts = [data] if isinstance(data, bytes | bytearray | memoryview) else data
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with _named(path):
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with _closing(fd):
                for part in parts:
                    _write_all(fd, part)
                _flush(fd)
            os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _write_all(fd: int, data: bytes | memoryview) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        written = os.write(fd, rest)
        if written == 0:
            raise OSError(errno.EIO, "the system wrote none of the bytes")
        rest = rest[written:]


def _flush(fd: int) -> None:
    """fsync, through the drive's own cache: on macOS that takes F_FULLFSYNC."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(fd, full)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    os.fsync(fd)


def _sync_folder(folder: Path) -> None:
    with _named(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with _closing(fd):
            try:
                _flush(fd)
            except OSError as error:
                if error.errno != errno.EINVAL:  # some file systems cannot sync folders
                    raise


def _new_subfolder(folder: Path) -> Path:
    for number in range(1, 100_000):
        aside = folder / f"earlier-{number:03d}"
        with contextlib.suppress(FileExistsError):
            aside.mkdir()
            _sync_folder(folder)
            return aside
    raise FileExistsError(errno.EEXIST, "no free name left for earlier-NNN in", str(folder))


def _read_pid(fd: int) -> int | None:
    """Return the pid in a lock file, or None if that process no longer exists."""
    digits = os.pread(fd, 32, 0).strip()
    if not digits.isdigit():
        return None
    try:
        os.kill(int(digits), 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:  # alive, but owned by another user
        pass
    return int(digits)


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Give an `OSError` from a descriptor or a temporary file the path that the user knows."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
