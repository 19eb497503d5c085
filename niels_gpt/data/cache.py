"""Streams cached on disk: the bytes in `{name}.bin`, their origin in `{name}.meta.json`.

A meta file holds the inputs as the builder names them, and `length` and `sha256` of the bytes. A
stream is served only for equal inputs, and only if its bytes match that length and digest. The meta
file is removed before the bytes are replaced: a reader that finds others than it tells of sees that
it is gone or has changed, and so does not take a writer for damage.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from niels_gpt.files.durable import (
    FolderInUseError,
    lock_folder,
    make_folder,
    remove_temporaries,
    write_durably,
)


class Stream(NamedTuple):
    """Bytes with their digest, so that they are hashed only once."""

    data: bytes
    sha256: str
    report: Mapping[str, Any] = MappingProxyType({})  # JSON-like: what making it showed


class DamagedCacheError(ValueError):
    """A cached stream does not match its meta file."""


def digest(data: bytes) -> Stream:
    """Hash a stream."""
    return Stream(data, hashlib.sha256(data).hexdigest())


def read_meta(folder: Path, name: str) -> dict[str, Any]:
    """Read the meta file of a cached stream; {} if it is missing or invalid."""
    try:
        meta = json.loads((folder / f"{name}.meta.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def read_stream(folder: Path, name: str, inputs: dict[str, Any]) -> Stream | None:
    """Return the cached stream made from `inputs`, or None if there is none.

    Raises:
        DamagedCacheError: if its length or digest is wrong.
    """
    before = read_meta(folder, name)
    meta = dict(before)
    length, sha256 = meta.pop("length", None), meta.pop("sha256", None)
    report = meta.pop("report", {})
    if meta != inputs:
        return None
    path = folder / f"{name}.bin"
    problem = "does not match the length and digest in its meta file"
    try:
        stream = digest(path.read_bytes() if path.stat().st_size == length else b"")
        if (len(stream.data), stream.sha256) == (length, sha256):
            return stream._replace(report=report if isinstance(report, dict) else {})
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    if read_meta(folder, name) != before:
        return None
    raise DamagedCacheError(f"{path} {problem}")


def write_streams(folder: Path, items: Iterable[tuple[str, dict[str, Any], Stream]]) -> None:
    """Cache each (name, inputs, stream) durably; do nothing if another process is writing.

    Raises:
        OSError: if the folder cannot be written.
    """
    make_folder(folder)
    try:
        with lock_folder(folder):
            remove_temporaries(folder)
            for name, inputs, stream in items:
                meta = {**inputs, "length": len(stream.data), "sha256": stream.sha256}
                if stream.report:
                    meta["report"] = dict(stream.report)
                path = folder / f"{name}.meta.json"
                path.unlink(missing_ok=True)
                write_durably([folder / f"{name}.bin"], stream.data)
                write_durably([path], json.dumps(meta, indent=2, sort_keys=True).encode())
    except FolderInUseError:
        pass
