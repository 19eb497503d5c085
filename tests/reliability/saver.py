"""Save, report, save again: a program whose system calls are made to fail.

`python -m tests.reliability.saver --bytes TRIES CONTENT NAME...` writes the bytes of the file
CONTENT under each name, as a checkpoint is written; with `--checkpoint` it loads CONTENT and
goes through `write_checkpoint` instead. What happens between the two marks is the first try. It
prints, as JSON, for each try the error (errno and path, or null), the bytes that then stood under
each name (their SHA-256, or null), and the other files of the folder.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from niels_gpt.files.durable import write_durably

BEGIN, END = "MARK-OF-THE-BEGIN", "MARK-OF-THE-END"


def main(arguments: list[str]) -> None:
    """Do what the module says."""
    mode, tries, content, *names = arguments
    savers = {"--bytes": saver_of_bytes, "--checkpoint": saver_of_checkpoint}
    save = savers[mode](Path(content))
    paths = [Path(name) for name in names]
    reports = []
    for _ in range(int(tries)):
        os.access(BEGIN, os.F_OK)
        error = attempt(save, paths)
        os.access(END, os.F_OK)
        others = set(os.listdir(paths[0].parent)) - {path.name for path in paths}
        reports.append([error, [sha256(path) for path in paths], sorted(others)])
    print(json.dumps(reports), flush=True)


def sha256(path: Path) -> str | None:
    """Return the digest of a file's bytes, None for no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def saver_of_bytes(content: Path) -> Callable[[list[Path]], object]:
    """Return a save of ready bytes, which needs no torch."""
    data = content.read_bytes()
    return lambda names: write_durably(names, data)


def saver_of_checkpoint(content: Path) -> Callable[[list[Path]], object]:
    """Return the save that the training loop makes."""
    from niels_gpt.checkpoint import open_checkpoint, write_checkpoint

    checkpoint = open_checkpoint(content)
    return lambda names: write_checkpoint(names, checkpoint)


def attempt(save: Callable[[list[Path]], object], names: list[Path]) -> list[object] | None:
    """Return None, or what the error told."""
    try:
        save(names)
    except OSError as error:
        return [error.errno, error.filename]
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
