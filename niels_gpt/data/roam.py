"""Folders of markdown notes: Roam, Obsidian and Logseq exports, or any tree of `*.md` files."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

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
from niels_gpt.data.split import split_by_key
from niels_gpt.data.text import is_blank, machine_lines, nfc, to_utf8, without_machine_lines

PathT = TypeVar("PathT", bound=str | Path)

BUILDER = 3  # counts changes of the streams that are made of the same notes
SUFFIXES = (".md", ".markdown")  # in any case
TEXT_SUFFIXES = {  # of files that may well be notes, but in another format
    ".adoc", ".asciidoc", ".htm", ".html", ".mdown", ".mdx", ".mkd", ".org", ".qmd", ".rmd", ".rst",
    ".rtf", ".tex", ".text", ".textile", ".txt", ".wiki",
}  # fmt: skip
NO_TEXT = "no text, or not in UTF-8"
HIDDEN = "hidden"
IN_CLOUD = "only in iCloud; download it to train on it"
LOGSEQ_BACKUP = "Logseq's backups"
_LOGSEQ_COPIES = ("bak", "version-files")  # older versions of pages; the second by its sync
SKIPPED_BY_DESIGN = (HIDDEN, LOGSEQ_BACKUP)  # not notes of their own, so not reported


class Skipped(NamedTuple):
    """A file or folder that was left out."""

    path: Path
    reason: str


class Scan(NamedTuple):
    """What there is in a folder, except in hidden folders, backups and links to folders."""

    notes: dict[Path, os.stat_result]  # sorted, each file once
    skipped: list[Skipped]
    others: Counter[str]  # files that are no notes, by suffix


class Note(NamedTuple):
    """A note as it is used."""

    path: Path
    text: bytes  # UTF-8


class Texts(NamedTuple):
    """The texts of files without empty ones, and what reading them showed."""

    texts: dict[Path, bytes]  # UTF-8
    unread: list[Remark]  # files that could not be read
    skipped: list[Remark]  # files that are no text
    altered: list[Remark]  # files that are not plain UTF-8
    messages: list[str]


class Notes(NamedTuple):
    """The notes of a folder, split, and what reading them showed."""

    train: list[Note]
    val: list[Note]
    unread: list[Remark]  # files that could not be read
    altered: list[Remark]  # files that are not plain UTF-8
    messages: list[str]


def recipes(how: Reading) -> list[Recipe]:
    """Make each note below the folder a document."""
    root, scan = _find(how)
    inputs = {
        "builder": BUILDER,
        "root": str(root),
        "files": [stamp(*found) for found in scan.notes.items()],
        "sep": how.separator,
        "seed": how.seed,
        "val_frac": how.val_frac,
        "skip_machine_lines": how.skip_machine_lines,
    }
    origin = "notes" + WITHOUT_MACHINE_LINES * how.skip_machine_lines
    return [Recipe(origin, str(root), inputs, lambda: _build(root, scan, how), _messages(scan))]


def read_notes(how: Reading) -> Notes:
    """Read and split the notes of a folder, without empty ones and those that cannot be read.

    Raises:
        Unavailable: if there is none.
    """
    return _read(*_find(how), how)


def list_roam_paths(root: str | Path) -> list[str]:
    """List the notes below `root`: sorted absolute paths of `*.md` files (see `scan_notes`)."""
    return sorted(map(str, scan_notes(root)[0]))


def scan_notes(root: str | Path) -> tuple[list[Path], list[Skipped]]:
    """Find the notes below `root`, and what was left out, each sorted by path.

    Hidden files and folders (`.obsidian`, `.trash`), Logseq's `logseq/bak` and
    `logseq/version-files`, links to folders (which may form loops), anything but a readable regular
    file, and further names of one file are left out. Only names below `root` count: `root` itself
    may be hidden or a link.
    """
    scan = scan_folder(root)
    return list(scan.notes), scan.skipped


def scan_folder(root: str | Path, is_wanted: Callable[[Path], bool] | None = None) -> Scan:
    """Look through a folder for notes, or for other files; see `scan_notes`.

    Whatever cannot be looked at is skipped.
    """
    is_wanted = is_wanted or is_note
    found: dict[Path, os.stat_result] = {}
    skipped: list[Skipped] = []
    others: Counter[str] = Counter()
    for path in _walk(Path(os.path.abspath(root)), skipped):
        if (absent := _in_cloud(path)) and is_wanted(absent):
            skipped.append(Skipped(absent, IN_CLOUD))
        elif not is_wanted(path):
            others.update([] if path.name.startswith(".") else [path.suffix.lower() or "no suffix"])
        elif reason := _why_not_note(path, found):
            skipped.append(Skipped(path, reason))
    notes, copies = _once(found)
    return Scan(notes, sorted(skipped + copies), others)


def is_note(path: str | Path) -> bool:
    """Tell a note by its suffix."""
    return Path(path).suffix.lower() in SUFFIXES


def load_texts(paths: Iterable[str | Path]) -> list[str]:
    """Read each file as UTF-8, invalid bytes replaced by U+FFFD, line ends unchanged."""
    return [Path(path).read_bytes().decode("utf-8", errors="replace") for path in paths]


def split_roam_paths(
    paths: Iterable[PathT],
    *,
    val_frac: float = 0.1,
    seed: int,
    root: str | Path | None = None,
    sizes: Mapping[PathT, int] | None = None,
) -> tuple[list[PathT], list[PathT]]:
    """Split notes into (train, val) by their path relative to `root` (default: common parent).

    Both lists keep the given order; a path given twice counts once. See `split_by_key`.

    Args:
        sizes: bytes of each note, by default those of its file, 0 if there is none.
    """
    unique = list(dict.fromkeys(paths))
    if not unique:
        return [], []
    top = root if root is not None else _common_parent(unique)
    size: Callable[[PathT], int] = _file_size if sizes is None else sizes.__getitem__
    return split_by_key(
        unique,
        lambda path: os.fsencode(nfc(os.path.relpath(path, top))),
        val_frac=val_frac,
        seed=seed,
        size=size,
    )


# --- finding notes -----------------------------------------------------------------------------


def _find(how: Reading) -> tuple[Path, Scan]:
    if not str(how.place):
        raise Unavailable("no folder of notes was given")
    root = Path(os.path.abspath(how.place))
    scan = scan_folder(root)
    if not scan.notes:
        raise Unavailable(_why_no_notes(root, scan))
    return root, scan


def _why_no_notes(root: Path, scan: Scan) -> str:
    reasons = dict(scan.skipped)
    if reasons.get(root) == os.strerror(errno.ENOENT):
        return f"no notes (*.md): {root} does not exist"
    if reasons.get(root) == os.strerror(errno.ENOTDIR):
        return f"no notes (*.md) under {root}, which is not a folder"
    if root in reasons:
        return f"{root} cannot be read: {reasons[root]}"
    return "; ".join([f"no notes (*.md) under {root}", *_messages(scan)])


def _messages(scan: Scan) -> list[str]:
    """Say what a user may miss among the notes."""
    lost = [Remark(str(path), why) for path, why in scan.skipped if why not in SKIPPED_BY_DESIGN]
    texts = Counter({s: n for s, n in scan.others.items() if s in TEXT_SUFFIXES})
    return [*tell("left out", lost), *tell_suffixes("text", texts)]


def tell_suffixes(kind: str, counts: Counter[str]) -> list[str]:
    """Return a message with the number of files of each suffix; none if there are no files."""
    if not counts:
        return []
    suffixes = ", ".join(f"{n:,} {suffix}" for suffix, n in counts.most_common(8))
    total = counts.total()
    verb = "file is" if total == 1 else "files are"
    return [f"{total:,} {kind} {verb} not read ({suffixes}): notes are *.md and *.markdown"]


def _walk(top: Path, skipped: list[Skipped]) -> Iterator[Path]:
    """Yield the files below a folder; add folders that are left out to `skipped`."""

    def note_error(error: OSError) -> None:
        skipped.append(Skipped(Path(error.filename), error.strerror or str(error)))

    for folder, subfolders, files in os.walk(top, onerror=note_error):
        here = Path(folder)
        reasons = {name: _why_not_folder(here / name) for name in subfolders}
        subfolders[:] = [name for name in subfolders if not reasons[name]]
        skipped += [Skipped(here / name, reason) for name, reason in reasons.items() if reason]
        yield from (here / name for name in files)


def _why_not_folder(folder: Path) -> str:
    if folder.name.startswith("."):
        return HIDDEN
    if folder.name in _LOGSEQ_COPIES and folder.parent.name == "logseq":
        return LOGSEQ_BACKUP
    return "link to a folder" if os.path.islink(folder) else ""


def _in_cloud(path: Path) -> Path | None:
    """Return the file for which macOS keeps a placeholder, such as `.note.md.icloud`."""
    name = path.name.removeprefix(".").removesuffix(".icloud")
    return path.with_name(name) if name and path.name == f".{name}.icloud" else None


def _why_not_note(path: Path, found: dict[Path, os.stat_result]) -> str:
    """Add a note to `found`, or return why it is none."""
    if path.name.startswith("."):
        return HIDDEN
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        if not os.access(path, os.R_OK):
            path.open("rb").close()  # for the reason
    except OSError as error:
        return error.strerror or str(error)
    found[path] = status
    return ""


def _once(
    found: Mapping[Path, os.stat_result],
) -> tuple[dict[Path, os.stat_result], list[Skipped]]:
    """Keep one name of each file, of a linked one the name that is not a link."""
    first: dict[tuple[int, int], Path] = {}
    links = {path for path in found if os.path.islink(path)}
    copies = []
    for path in sorted(found, key=lambda path: (path in links, path)):
        status = found[path]
        other = first.setdefault((status.st_dev, status.st_ino), path)
        # Some file systems have no inodes; there only a link can be a second name.
        if other != path and (path in links or status.st_nlink > 1):
            copies.append(Skipped(path, f"the same file as {other}"))
    left_out = {copy.path for copy in copies}
    kept = (path for path in found if path not in left_out)
    return {path: found[path] for path in sorted(kept, key=_order)}, copies


def _order(path: Path) -> tuple[list[str], Path]:
    """Sort by the names in NFC, so that the streams are the same on macOS and on Linux."""
    return nfc(path).split("/"), path


# --- reading them ------------------------------------------------------------------------------


def read_texts(
    paths: Iterable[Path],
    what: str,
    *,
    skip_machine_lines: bool,
    is_wanted: Callable[[bytes], bool] = lambda data: True,
) -> Texts:
    """Read files as text; `what` they are is for the messages."""
    texts: dict[Path, bytes] = {}
    unread, skipped, altered = [], [], []
    machine: list[int] = []  # lengths of lines
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError as error:
            unread.append(Remark(str(path), error.strerror or str(error)))
            continue
        if not is_wanted(data):
            skipped.append(Remark(str(path), NO_TEXT))
            continue
        text, problem = to_utf8(data)
        if problem:
            altered.append(Remark(str(path), problem))
        machine += map(len, machine_lines(text))
        texts[path] = without_machine_lines(text) if skip_machine_lines else text
    kept = {path: text for path, text in texts.items() if not is_blank(text)}
    messages = _tell_texts(len(texts) - len(kept), what, machine, skip_machine_lines)
    return Texts(kept, unread, skipped, altered, messages)


def _read(root: Path, scan: Scan, how: Reading) -> Notes:
    found = read_texts(scan.notes, "note", skip_machine_lines=how.skip_machine_lines)
    notes = [Note(*pair) for pair in found.texts.items()]
    if not notes:
        why = "; ".join([*tell("left out", found.unread), *found.messages])
        what = "can be read" if len(found.unread) == len(scan.notes) else "have text"
        raise Unavailable(f"no notes (*.md) under {root} {what}; {why}")
    train, val = _split(notes, root, how)
    return Notes(train, val, found.unread, found.altered, found.messages)


def _split(notes: list[Note], root: Path, how: Reading) -> tuple[list[Note], list[Note]]:
    _, val = split_roam_paths(
        [note.path for note in notes],
        val_frac=how.val_frac,
        seed=how.seed,
        root=root,
        sizes={path: len(text) for path, text in notes},
    )
    chosen = set(val)
    return [n for n in notes if n.path not in chosen], [n for n in notes if n.path in chosen]


def _tell_texts(empty: int, what: str, machine: list[int], skip: bool) -> list[str]:
    messages = []
    if empty:
        messages.append(f"{empty:,} empty {what}{'s' * (empty > 1)} left out")
    if machine:
        size = sum(machine)
        fate = "left out" if skip else "read as text (--skip-machine-lines leaves them out)"
        messages.append(
            f"{len(machine):,} line{'s' * (len(machine) > 1)} of machine data such as embedded "
            f"pictures, {size:,} bytes: {fate}"
        )
    return messages


def _build(root: Path, scan: Scan, how: Reading) -> Made:
    notes = _read(root, scan, how)
    sides = notes.train, notes.val
    train, val = (Joined([note.text for note in side], how.separator) for side in sides)
    lost = {remark.path for remark in notes.unread}
    return Made(
        train,
        val,
        documents=(len(notes.train), len(notes.val)),
        altered=notes.altered,
        messages=notes.messages,
        unread=notes.unread,
        files=[stamp(*found) for found in scan.notes.items() if str(found[0]) not in lost],
    )


def _file_size(path: str | Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _common_parent(paths: Iterable[str | Path]) -> str:
    return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
