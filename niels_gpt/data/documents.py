"""Any text: files and folders of UTF-8 text, the source "text".

Ten files or more are split by document, as notes are. Fewer, and those with more than a fifth of
all bytes, are each split by bytes: their last tenth is for validation.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from niels_gpt.data.recipe import (
    WITHOUT_MACHINE_LINES,
    Joined,
    Made,
    Reading,
    Recipe,
    Remark,
    Unavailable,
    stamp,
    tell,
)
from niels_gpt.data.roam import SKIPPED_BY_DESIGN, Texts, read_texts, scan_folder
from niels_gpt.data.split import split_by_key
from niels_gpt.data.text import is_text, nfc

BUILDER = 1  # counts changes of the streams that are made of the same files


class File(NamedTuple):
    """A file of the text."""

    path: Path
    key: str  # its path below the folder that was named, or its name if it was named itself
    status: os.stat_result
    is_named: bool


class Document(NamedTuple):
    """A file's text, or the part of it that is for training or for validation."""

    key: str  # of its file
    text: bytes


def recipes(how: Reading) -> list[Recipe]:
    """Make each file a document, of a folder each one that holds text."""
    files, where, left_out = _look(how)
    inputs = {
        "builder": BUILDER,
        "files": [_stamp(file) for file in files.values()],
        "sep": how.separator,
        "seed": how.seed,
        "val_frac": how.val_frac,
        "skip_machine_lines": how.skip_machine_lines,
    }
    origin = "text" + WITHOUT_MACHINE_LINES * how.skip_machine_lines
    told = tell("left out", left_out)
    return [Recipe(origin, where, inputs, lambda: _build(files, how), told, left_out=left_out)]


def read_documents(how: Reading) -> list[Document]:
    """Read what is for training of the files that are named and those of the folders that are.

    Raises:
        Unavailable: if there is nothing, or a named file holds no text.
    """
    files, _, _ = _look(how)
    return _read(files, how)[1]


def _look(how: Reading) -> tuple[dict[Path, File], str, list[Remark]]:
    """Return the files, the places where they are, and what is left out."""
    places = [Path(os.path.abspath(place)) for place in (how.place, *how.more) if str(place)]
    if not places:
        raise Unavailable("no text was given with --text")
    left_out: list[Remark] = []
    files = {file.path: file for file in _find(places, left_out)}
    where = ", ".join(map(str, places))
    if not files:
        raise Unavailable("; ".join([f"no files in {where}", *tell("left out", left_out)]))
    return files, where, left_out


def _find(places: list[Path], left_out: list[Remark]) -> Iterator[File]:
    """Yield the files that are named and those of the folders that are; a later name counts."""
    for place in sorted(places, key=Path.is_file):
        if place.is_file():
            yield File(place, place.name, place.stat(), is_named=True)
            continue
        scan = scan_folder(place, is_wanted=lambda path: True)
        for path, why in scan.skipped:
            if why not in SKIPPED_BY_DESIGN:
                left_out.append(Remark(str(path), why))
        for path, status in scan.notes.items():
            yield File(path, os.path.relpath(path, place), status, is_named=False)


def _stamp(file: File) -> dict[str, object]:
    return {**stamp(file.path, file.status), "key": nfc(file.key)}


def _build(files: dict[Path, File], how: Reading) -> Made:
    found, train, val = _read(files, how)
    unread = {remark.path for remark in found.unread}
    return Made(
        Joined([document.text for document in train], how.separator),
        Joined([document.text for document in val], how.separator),
        documents=(len(train), len(val)),
        altered=found.altered,
        messages=found.messages,
        unread=found.unread,
        skipped=found.skipped,
        files=[_stamp(file) for path, file in files.items() if str(path) not in unread],
    )


def _read(files: dict[Path, File], how: Reading) -> tuple[Texts, list[Document], list[Document]]:
    """Return what reading the files showed, and their text, split."""
    found = read_texts(files, "file", skip_machine_lines=how.skip_machine_lines, is_wanted=is_text)
    if lost := _lost(files, found):
        raise Unavailable("; ".join(lost))
    documents = [Document(files[path].key, text) for path, text in found.texts.items()]
    return found, *split_documents(documents, val_frac=how.val_frac, seed=how.seed)


def _lost(files: dict[Path, File], found: Texts) -> list[str]:
    """Return what is wrong with the files that the user named, or with all of them."""
    wrong = dict([*found.unread, *found.skipped])
    named = [file.path for file in files.values() if file.is_named]
    lost = [
        f"{path}: {wrong.get(str(path), 'is empty')}" for path in named if path not in found.texts
    ]
    if lost or found.texts:
        return lost
    return ["no file has text", *tell("left out", [*found.unread, *found.skipped]), *found.messages]


def split_documents(
    documents: list[Document], *, val_frac: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Split documents into train and val: whole, or few of them by bytes.

    Of documents of which one would be too much of the text, the end is for validation: those with
    more than twice `val_frac` of it, and all where `int(n * val_frac)` of the others is 0. The
    others are split by `split_by_key`.
    """
    limit = 2 * val_frac * sum(len(document.text) for document in documents)
    whole = [i for i, document in enumerate(documents) if len(document.text) <= limit]
    whole = whole if int(len(whole) * val_frac) else []
    _, held_out = split_by_key(
        whole,
        lambda i: os.fsencode(nfc(documents[i].key)),
        val_frac=val_frac,
        seed=seed,
        size=lambda i: len(documents[i].text),
    )
    sides = {i: (documents[i].text, b"") for i in whole} | {
        i: (b"", documents[i].text) for i in held_out
    }
    cuts = [
        (key, sides[i] if i in sides else split_bytes(text, val_frac=val_frac))
        for i, (key, text) in enumerate(documents)
    ]
    train = [Document(key, text) for key, (text, _) in cuts if text]
    return train, [Document(key, text) for key, (_, text) in cuts if text]


def split_bytes(text: bytes, *, val_frac: float) -> tuple[bytes, bytes]:
    """Cut UTF-8 text in two, the second part being the last `val_frac` of the bytes or less.

    It begins after the first blank line in the first half of that last part, without one after the
    first line end there, else where a character begins. The parts joined are the text.
    """
    first = round(len(text) * (1 - val_frac))
    last = first + (len(text) - first) // 2
    for end in (b"\n\n", b"\n"):
        if (at := text.find(end, first, last)) >= 0:
            return text[: at + len(end)], text[at + len(end) :]
    while first < len(text) and text[first] & 0xC0 == 0x80:
        first += 1
    return text[:first], text[first:]
