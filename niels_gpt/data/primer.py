"""The chat primer: short dialogues in one text file, separated by a delimiter."""

import os
from pathlib import Path

from niels_gpt.data.recipe import Made, Reading, Recipe, Remark, Unavailable, stamps, to_bytes
from niels_gpt.data.split import split_by_key
from niels_gpt.data.text import decode

BUILDER = 3  # counts changes of the streams that are made of the same file
DIALOGUE_DELIM = "\n\n<dialogue>\n\n"


def recipes(how: Reading) -> list[Recipe]:
    """Make each dialogue of the file a document; `separator` is also the file's delimiter."""
    if not str(how.place):
        raise Unavailable("no primer file was given")
    path = Path(os.path.abspath(how.place))
    if not path.is_file():
        raise Unavailable(f"no primer file at {path}")

    def build() -> Made:
        text, problem = decode(path.read_bytes())
        train, val = split_primer_dialogues(
            text, val_frac=how.val_frac, seed=how.seed, delimiter=how.separator
        )
        altered = [Remark(str(path), problem)] if problem else []
        counts = (train.count(how.separator) + 1, val.count(how.separator) + bool(val))
        return Made(to_bytes(train), to_bytes(val), counts, altered)

    inputs = {
        "builder": BUILDER,
        "path": str(path),
        "files": stamps([path]),
        "delimiter": how.separator,
        "seed": how.seed,
        "val_frac": how.val_frac,
    }
    return [Recipe("primer", str(path), inputs, build)]


def load_primer_text(path: str | Path) -> str:
    """Read the primer as UTF-8, or as its byte order mark says; invalid bytes are replaced.

    Line ends become \\n, because the delimiter contains them.
    """
    return decode(Path(path).read_bytes()).text


def split_primer_dialogues(
    text: str, *, val_frac: float = 0.1, seed: int, delimiter: str = DIALOGUE_DELIM
) -> tuple[str, str]:
    """Split the dialogues into (train_text, val_text), each joined by the delimiter.

    Dialogues are stripped, empty ones dropped, and the rest split by `split_by_key` on their text.
    """
    blocks = [block for part in text.split(delimiter) if (block := part.strip())]
    train, val = split_by_key(
        blocks, to_bytes, val_frac=val_frac, seed=seed, size=lambda block: len(to_bytes(block))
    )
    return delimiter.join(train), delimiter.join(val)
