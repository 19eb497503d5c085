"""Strict JSON, with messages that say what is wrong in a file.

Standard library only, so that a bad config is reported before torch is imported.
"""

import codecs
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

MAX_LISTED = 100  # problems in one message


def parse_json(text: str) -> Any:
    """Parse one JSON value strictly as in RFC 8259; ValueError says what is wrong and where.

    Also rejected, unlike in `json`: duplicate keys, NaN and Infinity, and nesting deeper than
    the interpreter's stack. A number too large for a float becomes infinite, as in `json`.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_object_without_duplicates, parse_constant=_refuse_constant
        )
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not valid JSON, line {error.lineno} column {error.colno}: {error.msg}"
        ) from None
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = [show(key) for key, count in counts.items() if count > 1]
        raise ValueError(f"key given more than once: {', '.join(twice[:MAX_LISTED])}")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that JSON allows")


def load_json(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> Any:
    """Read one JSON value from a UTF-8 file, strictly (see `parse_json`).

    Reads at most `max_bytes` + 1 bytes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it cannot be read or is invalid.
    """
    try:
        with open(path, "rb") as file:
            data = file.read() if max_bytes is None else file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL byte in the name
        raise ValueError(f"{str(path)!r} is not a file name: {error}") from None
    if max_bytes is not None and len(data) > max_bytes:
        raise ValueError(f"{path}: larger than {max_bytes} bytes, not a config")
    if data.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path}: begins with a byte order mark; save it as UTF-8 without BOM")
    try:
        return parse_json(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def save_json(path: str | os.PathLike[str], data: object) -> None:
    """Write `data` as UTF-8 JSON, indent 2, keys sorted.

    A value that JSON cannot hold, NaN included, raises before the file is touched.
    """
    text = json.dumps(data, ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False)
    Path(path).write_bytes((text + "\n").encode("utf-8"))


def to_json(value: object) -> str:
    """Encode named tuples, dicts and lists as JSON; non-finite numbers become null."""
    return json.dumps(plain(value), ensure_ascii=False, indent=2, allow_nan=False)


def plain(value: Any) -> Any:
    """Return nested values as JSON has them: see `to_json`."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(value: object) -> str:
    """Return any value as short ASCII text, as JSON if possible."""
    if isinstance(value, int) and value.bit_length() > 512:
        return f"(an integer of {value.bit_length()} bits)"
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"({type(value).__name__})"
    return shorten(text)


def shorten(text: str) -> str:
    """Return at most about 80 characters of a text, and how many it has."""
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
