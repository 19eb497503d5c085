"""Files as text: their encoding, their line ends, and lines that no person wrote."""

import codecs
import io
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from niels_gpt.files.mapped import chunks

LONGEST_WORD = 2000  # bytes of ASCII without a space; longer ones are not words, in any language
_WORD_TOO_LONG = re.compile(rb"[!-~]{%d,}" % (LONGEST_WORD + 1))
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


class Utf8(NamedTuple):
    """As `Decoded`, the text as UTF-8."""

    text: bytes
    problem: str


def decode(data: bytes) -> Decoded:
    """Decode by the byte order mark, without one as UTF-8; every line end becomes \\n.

    What is invalid becomes U+FFFD, and is counted in `problem`.
    """
    text, problem = to_utf8(data)
    return Decoded(text.decode(), problem)


def to_utf8(data: bytes) -> Utf8:
    """Do as `decode`, in parts: as a str, text with one emoji takes four bytes a character."""
    bom, encoding = _encoding(data)
    body = data[len(bom) :]
    lost = _replaced(body, encoding)
    text = body
    if encoding != "UTF-8" or lost or b"\r" in body:
        text = b"".join(part.encode() for part in _decoded(body, encoding, newlines=True))
    problems = [f"{encoding}, converted to UTF-8"] if encoding != "UTF-8" else []
    if lost:
        problems.append(f"not {encoding}: {lost:,} characters were replaced")
    if nuls := text.count(b"\0"):
        problems.append(f"{nuls:,} NUL characters, so no text, or UTF-16 without its mark")
    return Utf8(text, "; ".join(problems))


def is_text(data: bytes) -> bool:
    """Tell text from binary data, and from text in another encoding than those of `decode`.

    Text has no NUL and few invalid characters: at most one in `VALID` characters.
    """
    bom, encoding = _encoding(data)
    if encoding == "UTF-8" and b"\0" in data:
        return False
    body, length = data[len(bom) :], 0
    for part in _decoded(body, encoding):
        if "\0" in part:
            return False
        length += len(part)
    return _replaced(body, encoding) * VALID <= length


def is_blank(text: bytes) -> bool:
    """Tell whether there is nothing but white space in UTF-8."""
    return not any(part.strip() for part in _decoded(text, "UTF-8"))


def not_utf8(data: bytes) -> str:
    """Return how bytes that are used as they are differ from UTF-8, "" if they do not."""
    _, encoding = _encoding(data)
    if encoding != "UTF-8":
        return f"{encoding}, used as it is: save it as UTF-8"
    lost = _replaced(data, encoding)
    return f"not UTF-8: {lost:,} invalid characters, used as they are" if lost else ""


def machine_lines(text: bytes) -> list[bytes]:
    """Return the lines that hold machine data: an ASCII word of more than `LONGEST_WORD` bytes.

    Embedded pictures (base64) and drawings (JSON) are such lines.
    """
    lines = (line.removesuffix(b"\n") for line in io.BytesIO(text) if len(line) > LONGEST_WORD)
    return [line for line in lines if _WORD_TOO_LONG.search(line)]


def without_machine_lines(text: bytes) -> bytes:
    """Drop the lines that `machine_lines` returns."""
    machine = set(machine_lines(text))
    return (
        b"\n".join(line for line in text.split(b"\n") if line not in machine) if machine else text
    )


def nfc(path: str | Path) -> str:
    """Return a path in Unicode's form NFC: macOS and Linux spell the same name differently."""
    return unicodedata.normalize("NFC", str(path))


def _encoding(data: bytes) -> tuple[bytes, str]:
    found = ((bom, encoding) for bom, encoding in _BOMS if data[:4].startswith(bom))
    return next(found, (b"", "UTF-8"))


def _decoded(
    data: bytes, encoding: str, errors: str = "replace", *, newlines: bool = False
) -> Iterator[str]:
    """Yield the text of bytes in parts; with `newlines`, every line end is \\n."""
    plain = codecs.getincrementaldecoder(encoding)(errors)
    decoder = io.IncrementalNewlineDecoder(plain, translate=True) if newlines else plain
    for part in chunks(data):
        yield decoder.decode(part)
    yield decoder.decode(b"", final=True)


def _replaced(data: bytes, encoding: str) -> int:
    """Count the characters that are replaced, which are not U+FFFD in the data itself."""
    try:
        for _ in _decoded(data, encoding, "strict"):
            pass
    except UnicodeDecodeError:
        found = sum(part.count("\ufffd") for part in _decoded(data, encoding))
        return max(1, found - _count(data, "\ufffd".encode(encoding)))
    return 0


def _count(data: bytes, what: bytes) -> int:
    """Count bytes that do not overlap themselves, also where parts meet."""
    total, end = 0, b""
    for part in chunks(data):
        whole = end + part
        total += whole.count(what)
        end = whole[1 - len(what) :]
    return total
