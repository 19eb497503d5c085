"""The chat primer: short dialogues in one text file, separated by a delimiter."""

import os
from pathlib import Path

from niels_gpt.data.recipe import Reading, Recipe, Unavailable, stamps, to_bytes
from niels_gpt.data.split import split_by_key

DIALOGUE_DELIM = "\n\n<dialogue>\n\n"


def recipes(how: Reading) -> list[Recipe]:
    """Make each dialogue of the file a document; `separator` is also the file's delimiter."""
    path = Path(os.path.abspath(how.place))
    if not path.is_file():
        raise Unavailable(f"no primer file at {path}")

    def split() -> tuple[str, str]:
        return split_primer_dialogues(
            load_primer_text(path),
            val_frac=how.val_frac,
            seed=how.seed,
            delimiter=how.separator,
        )

    def build() -> tuple[bytes, bytes]:
        train, val = split()
        return to_bytes(train), to_bytes(val)

    def documents() -> tuple[int, int]:
        train, val = (side.count(how.separator) + 1 for side in split())
        return train, val

    inputs = {
        "path": str(path),
        "files": stamps([path]),
        "delimiter": how.separator,
        "seed": how.seed,
        "val_frac": how.val_frac,
    }
    return [Recipe("primer", str(path), inputs, build, documents)]


def load_primer_text(path: str | Path) -> str:
    """Read the primer as UTF-8: invalid bytes replaced, a byte order mark dropped.

    Line ends become \\n, because the delimiter contains them.
    """
    return Path(path).read_text(encoding="utf-8-sig", errors="replace")


def split_primer_dialogues(
    text: str, *, val_frac: float = 0.1, seed: int, delimiter: str = DIALOGUE_DELIM
) -> tuple[str, str]:
    """Split the dialogues into (train_text, val_text), each joined by the delimiter.

    Dialogues are stripped, empty ones dropped, and the rest split by `split_by_key` on their text.
    """
    blocks = [block for part in text.split(delimiter) if (block := part.strip())]
    train, val = split_by_key(
        blocks, lambda block: block.encode(errors="replace"), val_frac=val_frac, seed=seed
    )
    return delimiter.join(train), delimiter.join(val)
