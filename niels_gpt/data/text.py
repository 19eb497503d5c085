"""Files as text: their encoding, their line ends, and lines that no person wrote."""

import codecs
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

from niels_gpt.files.mapped import chunks

LONGEST_WORD = 2000  # bytes of ASCII without a space; longer ones are not words, in any language
_WORD_TOO_LONG = re.compile(rf"[!-~]{{{LONGEST_WORD + 1},}}")
_BOMS = (  # in this order: the first UTF-32 begins like a UTF-16
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32-LE"),
    (codecs.BOM_UTF32_BE, "UTF-32-BE"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
)
VALID = 10


class Decoded(NamedTuple):
    """A file as text, and how it was not plain UTF-8 ("" if it was)."""

    text: str
    problem: str


def decode(data: bytes) -> Decoded:
    """Decode by the byte order mark, without one as UTF-8; every line end becomes \\n.

    What is invalid becomes U+FFFD, and is counted in `problem`.
    """
    bom, encoding = _encoding(data)
    text = data[len(bom) :].decode(encoding, "replace")
    lost = _replaced(data[len(bom) :], encoding, text)
    problems = [f"{encoding}, converted to UTF-8"] if encoding != "UTF-8" else []
    if lost:
        problems.append(f"not {encoding}: {lost:,} characters were replaced")
    if nuls := text.count("\0"):
        problems.append(f"{nuls:,} NUL characters, so no text, or UTF-16 without its mark")
    return Decoded(text.replace("\r\n", "\n").replace("\r", "\n"), "; ".join(problems))


def is_text(data: bytes) -> bool:
    """Tell text from binary data, and from text in another encoding than those of `decode`.

    Text has no NUL and few invalid characters: at most one in `VALID` characters.
    """
    bom, encoding = _encoding(data)
    if encoding == "UTF-8" and b"\0" in data:
        return False
    text = data[len(bom) :].decode(encoding, "replace")
    return "\0" not in text and _replaced(data[len(bom) :], encoding, text) * VALID <= len(text)


def not_utf8(data: bytes) -> str:
    """Return how bytes that are used as they are differ from UTF-8, "" if they do not."""
    _, encoding = _encoding(data)
    if encoding != "UTF-8":
        return f"{encoding}, used as it is: save it as UTF-8"
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    lost, end = 0, b""
    for part in chunks(data):  # because text may be larger than memory
        whole = end + part
        lost += decoder.decode(part).count("\ufffd") - whole.count("\ufffd".encode())
        end = whole[-2:]  # of a character that is cut here
    lost += decoder.decode(b"", final=True).count("\ufffd")
    return f"not UTF-8: {lost:,} invalid characters, used as they are" if lost else ""


def machine_lines(text: str) -> list[str]:
    """Return the lines that hold machine data: an ASCII word of more than `LONGEST_WORD` bytes.

    Embedded pictures (base64) and drawings (JSON) are such lines.
    """
    lines = (line for line in text.split("\n") if len(line) > LONGEST_WORD)
    return [line for line in lines if _WORD_TOO_LONG.search(line)]


def without_machine_lines(text: str) -> str:
    """Drop the lines that `machine_lines` returns."""
    machine = set(machine_lines(text))
    return "\n".join(line for line in text.split("\n") if line not in machine) if machine else text


def nfc(path: str | Path) -> str:
    """Return a path in Unicode's form NFC: macOS and Linux spell the same name differently."""
    return unicodedata.normalize("NFC", str(path))


def _encoding(data: bytes) -> tuple[bytes, str]:
    found = ((bom, encoding) for bom, encoding in _BOMS if data[:4].startswith(bom))
    return next(found, (b"", "UTF-8"))


def _replaced(data: bytes, encoding: str, text: str) -> int:
    """Count the characters that were replaced, which are not U+FFFD in the data itself."""
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return max(1, text.count("\ufffd") - data.count("\ufffd".encode(encoding)))
    return 0
