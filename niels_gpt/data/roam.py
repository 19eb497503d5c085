"""Folders of markdown notes: Roam, Obsidian and Logseq exports, or any tree of `*.md` files."""

import os
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

from niels_gpt.data.recipe import Reading, Recipe, Unavailable, join_documents, stamps
from niels_gpt.data.split import split_by_key

PathT = TypeVar("PathT", bound=str | Path)

HIDDEN = "hidden"
LOGSEQ_BACKUP = "Logseq's backups"
_LOGSEQ_COPIES = ("bak", "version-files")  # older versions of pages; the second by its sync
SKIPPED_BY_DESIGN = (HIDDEN, LOGSEQ_BACKUP)  # not notes of their own, so not reported


class Skipped(NamedTuple):
    """A file or folder that was left out."""

    path: Path
    reason: str


def recipes(how: Reading) -> list[Recipe]:
    """Make each note below the folder a document."""
    root = Path(os.path.abspath(how.place))
    found, skipped = scan_notes(root)
    if not found:
        no_folder = "" if root.is_dir() else ", which is not a folder"
        raise Unavailable(f"no notes (*.md) under {root}{no_folder}")
    sides = split_roam_paths(found, val_frac=how.val_frac, seed=how.seed, root=root)

    def build() -> tuple[bytes, bytes]:
        train, val = (join_documents(load_texts(side), sep=how.separator) for side in sides)
        return train, val

    lost = [s for s in skipped if s.reason not in SKIPPED_BY_DESIGN]
    return [
        Recipe(
            origin="notes",
            place=str(root),
            inputs={
                "files": stamps(found),
                "sep": how.separator,
                "seed": how.seed,
                "val_frac": how.val_frac,
            },
            build=build,
            documents=lambda: (len(sides[0]), len(sides[1])),
            messages=[f"{len(lost)} left out, the first {lost[0].path}: {lost[0].reason}"]
            if lost
            else [],
        )
    ]


def list_roam_paths(root: str | Path) -> list[Path]:
    """List the notes below `root`: sorted absolute paths of `*.md` files (see `scan_notes`)."""
    return scan_notes(root)[0]


def scan_notes(root: str | Path) -> tuple[list[Path], list[Skipped]]:
    """Find the notes below `root`, and what was left out, each sorted by path.

    Hidden files and folders (`.obsidian`, `.trash`), Logseq's `logseq/bak` and
    `logseq/version-files`, links to folders (which may form loops), and anything but a readable
    regular file are left out. Only names below `root` count: `root` itself may be hidden or a link.
    """
    top = Path(os.path.abspath(root))
    paths: list[Path] = []
    skipped: list[Skipped] = []

    def note_error(error: OSError) -> None:
        skipped.append(Skipped(Path(error.filename), error.strerror or str(error)))

    for folder, subfolders, files in os.walk(top, onerror=note_error):
        here = Path(folder)
        reasons = {name: _why_not_folder(here / name) for name in subfolders}
        subfolders[:] = [name for name in subfolders if not reasons[name]]
        reasons |= {name: _why_not_note(here / name) for name in files if name.endswith(".md")}
        paths += [here / name for name in files if reasons.get(name) == ""]
        skipped += [Skipped(here / name, reason) for name, reason in reasons.items() if reason]
    return sorted(paths), sorted(skipped)


def other_files(root: str | Path) -> Counter[str]:
    """Count by suffix the other files among the notes, except hidden ones."""
    counts: Counter[str] = Counter()
    for folder, subfolders, files in os.walk(os.path.abspath(root)):
        subfolders[:] = [name for name in subfolders if not _why_not_folder(Path(folder, name))]
        others = (name for name in files if not name.endswith(".md") and name[0] != ".")
        counts.update(Path(name).suffix or "no suffix" for name in others)
    return counts


def load_texts(paths: Iterable[str | Path]) -> list[str]:
    """Read each file as UTF-8, invalid bytes replaced by U+FFFD, line ends unchanged."""
    return [Path(path).read_bytes().decode("utf-8", errors="replace") for path in paths]


def split_roam_paths(
    paths: Iterable[PathT],
    *,
    val_frac: float = 0.1,
    seed: int,
    root: str | Path | None = None,
) -> tuple[list[PathT], list[PathT]]:
    """Split notes into (train, val) by their path relative to `root` (default: common parent).

    Both lists keep the given order; a path given twice counts once. See `split_by_key`.
    """
    unique = list(dict.fromkeys(paths))
    if not unique:
        return [], []
    top = root if root is not None else _common_parent(unique)
    return split_by_key(
        unique, lambda path: os.fsencode(os.path.relpath(path, top)), val_frac=val_frac, seed=seed
    )


def _common_parent(paths: Iterable[str | Path]) -> str:
    return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])


def _why_not_folder(folder: Path) -> str:
    if folder.name.startswith("."):
        return HIDDEN
    if folder.name in _LOGSEQ_COPIES and folder.parent.name == "logseq":
        return LOGSEQ_BACKUP
    return "link to a folder" if folder.is_symlink() else ""


def _why_not_note(path: Path) -> str:
    if path.name.startswith("."):
        return HIDDEN
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return error.strerror or str(error)
    if not stat.S_ISREG(mode):
        return "not a regular file"
    return "" if os.access(path, os.R_OK) else "no permission to read it"
