"""Streams cached on disk: the bytes in `{name}.bin`, their origin in `{name}.meta.json`.

A meta file holds the inputs as the builder names them, and `length` and `sha256` of the bytes. A
stream is served only for equal inputs, and only if its bytes match that length and digest.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
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
    meta = read_meta(folder, name)
    length, sha256 = meta.pop("length", None), meta.pop("sha256", None)
    if meta != inputs:
        return None
    path = folder / f"{name}.bin"
    try:
        stream = digest(path.read_bytes() if path.stat().st_size == length else b"")
    except OSError as error:
        raise DamagedCacheError(f"{path} cannot be read ({error.strerror})") from error
    if (len(stream.data), stream.sha256) != (length, sha256):
        raise DamagedCacheError(f"{path} does not match the length and digest in its meta file")
    return stream


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
                write_durably([folder / f"{name}.bin"], stream.data)
                write_durably(
                    [folder / f"{name}.meta.json"],
                    json.dumps(meta, indent=2, sort_keys=True).encode(),
                )
    except FolderInUseError:
        pass
