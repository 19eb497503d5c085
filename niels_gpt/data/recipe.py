"""Recipes, which readers of text return: they name their inputs and build two streams."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from niels_gpt.data.text import nfc

Documents = dict[str, list[str]]  # split -> documents
Stamp = dict[str, Any]  # of a file; see `stamp`

PART = 1 << 20  # bytes of documents that are joined at a time
TOLD = 3  # files named in one message
WITHOUT_MACHINE_LINES = " without machine lines"  # ends the origin of such a text


class Reading(NamedTuple):
    """How to read a source; each reader uses the fields it needs."""

    place: str | Path  # the folder or file; "" if none is given and there is no default
    seed: int  # of the split
    separator: str  # between documents
    val_frac: float
    load_wikitext: Callable[[], Documents] | None  # None: do not download
    fallback: bool  # whether a fallback text is allowed
    skip_machine_lines: bool = False
    more: tuple[str | Path, ...] = ()  # further places, of a source that takes several


class Remark(NamedTuple):
    """A file or folder that is not read, or not read as it is, and why."""

    path: str
    reason: str


class Joined(NamedTuple):
    """The text that `join_documents` returns, made in parts as it is written."""

    docs: Sequence[str | bytes]
    sep: str

    def parts(self) -> Iterator[bytes]:
        """Yield the bytes of some documents and separators at a time."""
        separator, waiting, size = to_bytes(self.sep), list[bytes](), 0
        for i, doc in enumerate(self.docs):
            data = to_bytes(doc)
            if size + len(data) >= PART:
                yield b"".join(waiting)
                waiting, size = [], 0
            waiting += [separator, data] if i else [data]
            size += len(data) + len(separator)
        yield b"".join(waiting)


Text = bytes | Joined


class Made(NamedTuple):
    """The two streams of a source, and what reading it showed."""

    train: Text
    val: Text
    documents: tuple[int, int] | None = None  # their numbers in train and val
    altered: Sequence[Remark] = ()  # files that are not plain UTF-8
    messages: Sequence[str] = ()  # for the user
    unread: Sequence[Remark] = ()  # files that could not be read
    skipped: Sequence[Remark] = ()  # files that are no text
    files: list[Stamp] | None = None  # that were read, if not all of the recipe's

    def reports(self) -> list[dict[str, Any]]:
        """Return, for train and val, what a cached stream is kept with; JSON-like."""
        found = {
            "altered": [list(remark) for remark in self.altered],
            "skipped": [list(remark) for remark in self.skipped],
            "messages": [*self.messages],
        }
        told = {name: value for name, value in found.items() if value}
        counts = [{"documents": n} for n in self.documents] if self.documents else [{}, {}]
        return [{**told, **count} for count in counts]


class Recipe(NamedTuple):
    """How to build the two streams of a source, and from exactly which inputs."""

    origin: str  # e.g. "notes" or "WikiText-103"
    place: str  # the folder or file it is read from, "" if there is none
    inputs: dict[str, Any]  # JSON-like; with `origin`: equal inputs, equal streams
    build: Callable[[], Made | tuple[Text, Text]]  # a plain tuple: train and val
    messages: Sequence[str] = ()  # for the user
    remedy: str = ""  # what the user can do if it is unavailable
    left_out: Sequence[Remark] = ()  # files and folders that are not read
    spares: str = ""  # origin of a cached stream that this one must not replace


class Unavailable(RuntimeError):
    """A source cannot be built; the message says why."""


def to_bytes(text: str | bytes) -> bytes:
    """Encode as UTF-8, if that was not done; a lone surrogate becomes "?"."""
    return text.encode(errors="replace") if isinstance(text, str) else text


def join_documents(docs: Iterable[str], *, sep: str) -> bytes:
    """Join documents by `sep` as UTF-8; a lone surrogate becomes "?"."""
    return to_bytes(sep).join(map(to_bytes, docs))


def stamp(path: Path, status: os.stat_result) -> Stamp:
    """Return what changes with a file: equal stamps, equal contents.

    Tools that synchronise files restore the modification time, but not ctime and inode.
    """
    return {
        "path": nfc(path),
        "mtime_ns": status.st_mtime_ns,
        "size": status.st_size,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def stamps(files: Iterable[Path]) -> list[Stamp]:
    """Return the stamp of each file."""
    return [stamp(path, path.stat()) for path in files]


def tell(what: str, remarks: Sequence[Remark]) -> list[str]:
    """Return a message that names the first files and counts the rest; none for no remarks."""
    if not remarks:
        return []
    named = "; ".join(f"{path}: {reason}" for path, reason in remarks[:TOLD])
    more = len(remarks) - TOLD
    rest = f"; and {more:,} more, see niels-gpt data info" if more > 0 else ""
    return [f"{len(remarks):,} {what}: {named}{rest}"]
