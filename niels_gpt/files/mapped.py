"""Large files as bytes that are read where they are used, so that they need no memory."""

import mmap
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

MAPPED_FROM = 64 << 20  # bytes; a smaller file is read whole
CHUNK = 256 << 10


class MappedBytes(mmap.mmap):
    """A file that is used as `bytes` are: length, slices, equality, `bytes(x)`, updating a digest.

    A slice is a copy, read by the system without the mapping: pages that are looked at through the
    mapping would count as memory of the process. The file is held open, so it may be replaced by
    another of the same name, but must not be changed.
    """

    _fd: int

    def __new__(cls, path: str | os.PathLike[str]) -> "MappedBytes":
        """Open a file that is not empty.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is empty.
        """
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mapped = super().__new__(cls, fd, 0, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(fd)
            raise
        mapped._fd = fd
        weakref.finalize(mapped, os.close, fd)
        return mapped

    def status(self) -> os.stat_result:
        """Return the status of the very file that is read."""
        return os.fstat(self._fd)

    def __getitem__(self, key: Any) -> Any:
        """Return a byte as an int, or a slice as bytes."""
        if not isinstance(key, slice) or key.step not in (None, 1):
            return super().__getitem__(key)
        start, stop, _ = key.indices(len(self))
        parts = []
        while start < stop:
            part = os.pread(self._fd, stop - start, start)
            if not part:
                raise OSError(f"the file has become shorter: {len(self)} bytes are not there")
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, bytes | bytearray | memoryview | MappedBytes):
            return NotImplemented
        return len(self) == len(other) and all(
            part == other[i * CHUNK : (i + 1) * CHUNK]
            for i, part in enumerate(chunks(cast(bytes, self)))
        )

    __hash__ = None  # type: ignore[assignment]  # as of a bytearray


def open_bytes(path: Path) -> bytes:
    """Return the content of a file, as `MappedBytes` if it is large."""
    if path.stat().st_size < MAPPED_FROM:
        return path.read_bytes()
    return cast(bytes, MappedBytes(path))


def chunks(data: bytes) -> Iterator[bytes]:
    """Yield bytes in parts of at most `CHUNK`."""
    for start in range(0, len(data), CHUNK):
        yield data[start : start + CHUNK]
