"""Streams cached on disk: the bytes in `{name}.bin`, their origin in `{name}.meta.json`.

A meta file holds the inputs as the builder names them, and `length` and `sha256` of the bytes. A
stream is served only for equal inputs, and only if its bytes match that length and digest. To hash
a large stream at each start would take longer than the start: once it was written or verified, its
file is known by a `seal` of its size, times and inode.

The meta file is removed before the bytes are replaced: a reader that finds others than it tells of
sees that it is gone or has changed, and so does not take a writer for damage.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from niels_gpt.data.recipe import Joined, Text
from niels_gpt.files.durable import (
    FolderInUseError,
    lock_folder,
    make_folder,
    remove_temporaries,
    write_durably,
)
from niels_gpt.files.mapped import MappedBytes, chunks, open_bytes


class Stream(NamedTuple):
    """Bytes with their digest, so that they are hashed only once."""

    data: bytes
    sha256: str
    report: Mapping[str, Any] = MappingProxyType({})  # JSON-like: what making it showed


class DamagedCacheError(ValueError):
    """A cached stream does not match its meta file."""


def digest(data: bytes) -> Stream:
    """Hash a stream."""
    sha = hashlib.sha256()
    for part in chunks(data):
        sha.update(part)
    return Stream(data, sha.hexdigest())


def hold(text: Text, report: Mapping[str, Any]) -> Stream:
    """Return a text as a stream without caching it."""
    data = b"".join(text.parts()) if isinstance(text, Joined) else text
    return digest(data)._replace(report=report)


def parts(text: Text) -> Iterator[bytes]:
    """Yield a text in parts that are small, or documents."""
    return text.parts() if isinstance(text, Joined) else chunks(text)


def read_meta(folder: Path, name: str) -> dict[str, Any]:
    """Read the meta file of a cached stream; {} if it is missing or invalid."""
    try:
        meta = json.loads((folder / f"{name}.meta.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def read_stream(
    folder: Path, name: str, inputs: dict[str, Any], *, verify: bool = False
) -> Stream | None:
    """Return the cached stream made from `inputs`, or None if there is none.

    A large stream is not hashed if its file is the one that was written or last verified, by the
    `seal` in the meta file, unless this is to `verify`.

    Raises:
        DamagedCacheError: if its length or digest is wrong.
    """
    before = read_meta(folder, name)
    meta = dict(before)
    length, sha256 = meta.pop("length", None), meta.pop("sha256", None)
    report, known = meta.pop("report", {}), meta.pop("seal", None)
    if meta != inputs:
        return None
    path = folder / f"{name}.bin"
    problem = "does not match the length and digest in its meta file"
    try:
        data = open_bytes(path) if path.stat().st_size == length else b""
        stream = Stream(data, str(sha256))
        if verify or known is None or known != seal(stream):
            stream = digest(data)
        if (len(data), stream.sha256) == (length, sha256):
            return stream._replace(report=report if isinstance(report, dict) else {})
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    if read_meta(folder, name) != before:
        return None
    raise DamagedCacheError(f"{path} {problem}")


def seal(stream: Stream) -> str | None:
    """Return what changes with the file or the digest of a large stream; None of bytes in memory.

    Whoever writes to the file, restores or copies it changes its ctime or inode. A disk that loses
    bits does not show.
    """
    if not isinstance(stream.data, MappedBytes):
        return None
    status = stream.data.status()
    of = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, stream.sha256)
    return hashlib.sha256(repr(of).encode()).hexdigest()


def keep_seals(folder: Path, streams: Iterable[tuple[str, Stream]]) -> None:
    """Note in the meta files that these streams were verified, where they do not say so yet.

    Does nothing if another process is writing, or the folder cannot be written.
    """
    new = [
        (name, {**meta, "seal": mark})
        for name, stream in streams
        if (mark := seal(stream))
        and (meta := read_meta(folder, name)).get("sha256") == stream.sha256
        and meta.get("seal") != mark
    ]
    with contextlib.suppress(OSError):
        if new:
            with lock_folder(folder):
                for name, meta in new:
                    _write_meta(folder, name, meta)


def write_streams(
    folder: Path, items: Iterable[tuple[str, dict[str, Any], Text, Mapping[str, Any]]]
) -> list[Stream] | None:
    """Cache each (name, inputs, text, report) durably; return the streams as they are served.

    Returns None, and does nothing, if another process is writing.

    Raises:
        OSError: if the folder cannot be written.
    """
    make_folder(folder)
    try:
        with lock_folder(folder):
            remove_temporaries(folder)
            return [_write(folder, *item) for item in items]
    except FolderInUseError:
        return None


def _write(
    folder: Path, name: str, inputs: dict[str, Any], text: Text, report: Mapping[str, Any]
) -> Stream:
    path, sha = folder / f"{name}.bin", hashlib.sha256()

    def hashed() -> Iterator[bytes]:
        for part in parts(text):
            sha.update(part)
            yield part

    (folder / f"{name}.meta.json").unlink(missing_ok=True)
    write_durably([path], hashed())
    stream = Stream(open_bytes(path), sha.hexdigest(), report)
    meta = {**inputs, "length": len(stream.data), "sha256": stream.sha256}
    extra = {"report": dict(report), "seal": seal(stream)}
    _write_meta(folder, name, meta | {key: value for key, value in extra.items() if value})
    return stream


def _write_meta(folder: Path, name: str, meta: dict[str, Any]) -> None:
    text = json.dumps(meta, indent=2, sort_keys=True)
    write_durably([folder / f"{name}.meta.json"], text.encode())
