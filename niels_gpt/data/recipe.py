"""Recipes, which readers of text return: they name their inputs and build two streams."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Documents = dict[str, list[str]]  # split -> documents


class Reading(NamedTuple):
    """How to read a source; each reader uses the fields it needs."""

    place: str | Path  # the folder or file; "" if none is given and there is no default
    seed: int  # of the split
    separator: str  # between documents
    val_frac: float
    load_wikitext: Callable[[], Documents] | None  # None: do not download
    fallback: bool  # whether a fallback text is allowed


class Recipe(NamedTuple):
    """How to build the two streams of a source, and from exactly which inputs."""

    origin: str  # e.g. "notes" or "WikiText-103"
    place: str  # the folder or file it is read from, "" if there is none
    inputs: dict[str, Any]  # JSON-like; with `origin`: equal inputs, equal streams
    build: Callable[[], tuple[bytes, bytes]]  # train and val
    documents: Callable[[], tuple[int, int]] | None = None  # their numbers in train and val
    messages: Sequence[str] = ()  # for the user
    remedy: str = ""  # what the user can do if it is unavailable
    spares: str = ""  # origin of a cached stream that this one must not replace


class Unavailable(RuntimeError):
    """A source cannot be built; the message says why."""


def to_bytes(text: str) -> bytes:
    """Encode as UTF-8; a lone surrogate becomes "?"."""
    return text.encode(errors="replace")


def join_documents(docs: Iterable[str], *, sep: str) -> bytes:
    """Join documents by `sep` as UTF-8; a lone surrogate becomes "?"."""
    return to_bytes(sep).join(map(to_bytes, docs))


def stamps(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Return path, modification time and size of each file: equal stamps, equal contents."""
    statuses = ((path, path.stat()) for path in files)
    return [
        {"path": str(path), "mtime_ns": status.st_mtime_ns, "size": status.st_size}
        for path, status in statuses
    ]
