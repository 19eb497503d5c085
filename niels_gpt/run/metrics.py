"""metrics.jsonl: one JSON object per line for each log and each evaluation of a run.

Every object has `kind` ("train" or "eval"), `step` (finished updates) and `bytes` (of text in that
many steps with the run's B and T). Only `seconds` (training time, across resumes) and
`bytes_per_s` depend on the clock; all else is equal in every run of the same config on the same
machine.
"""

import codecs
import json
import os
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from niels_gpt.files import durable
from niels_gpt.files.strict_json import parse_json

SHOWN = 5  # numbers of damaged lines in a message

CLOCK_FIELDS = ("seconds", "bytes_per_s")

Record = dict[str, Any]


def read_metrics(path: Path) -> list[Record]:
    """Return the records of a file; [] if there is no file. See `damage_in` for what is skipped."""
    return [record for record in _lines(path).values() if record is not None]


def damage_in(path: Path) -> list[str]:
    """Return a message if a file has lines that are not records.

    Blank lines are not named, nor is a last line that a power failure cut off.
    """
    damaged = [number for number, record in _lines(path).items() if record is None]
    if not damaged:
        return []
    named = ", ".join(map(str, damaged[:SHOWN]))
    more = f" and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
    lines = "lines" if damaged[1:] else "line"
    return [f"{path}: skipped what is not a record, in {lines} {named}{more}"]


def _lines(path: Path) -> dict[int, Record | None]:
    """Return what each line of a file holds, by its number from 1; None if that is not a record."""
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError:
        return {}
    lines = dict(enumerate(data.splitlines(), 1))
    found = {number: _record_in(line) for number, line in lines.items() if line.strip()}
    if not data.endswith((b"\n", b"\r")) and found.get(len(lines), 0) is None:
        del found[len(lines)]
    return found


def _record_in(line: bytes) -> Record | None:
    """Return the record in a line; None if it is not one, or has a number that is not finite."""
    try:
        record = parse_json(line.decode())
        to_lines([record])
    except ValueError:
        return None
    return record if _is_record(record) else None


def _is_record(value: object) -> bool:
    """Return whether a value has the fields that readers rely on."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("kind"), str)
        and isinstance(value.get("step"), int)
        and _is_time(value.get("seconds", 0.0))
    )


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1e12


def records_until(records: Iterable[Record], step: int, evaluated: int | None) -> list[Record]:
    """Keep the records known to a checkpoint of `step`, last evaluated after `evaluated`."""
    last = {"train": step, "eval": -1 if evaluated is None else evaluated}
    return [r for r in records if r["step"] <= last.get(r.get("kind", ""), -1)]


def to_lines(records: Iterable[Record]) -> bytes:
    """Encode records, one JSON object per line."""
    return b"".join(json.dumps(r, allow_nan=False).encode() + b"\n" for r in records)


class MetricsFile:
    """Appends records to a file once it is claimed; keeps them in memory until then."""

    def __init__(self, path: Path, records: Iterable[Record] = ()) -> None:
        self.path = path
        self._pending = to_lines(records)
        self._claimed = False

    def add(self, record: Record) -> None:
        """Append a record; it is durable after the next `sync`.

        Raises:
            OSError: if it cannot be written; it is kept and written with the next one.
        """
        self._pending += to_lines([record])
        if self._claimed:
            self._append()

    def claim(self) -> Path | None:
        """Replace the file by the records so far; return where the old one is kept if damaged."""
        kept = _keep_damaged(self.path)
        durable.write_durably([self.path], self._pending)
        self._pending = b""
        self._claimed = True
        return kept

    def sync(self) -> None:
        """Make all records durable.

        Raises:
            OSError: if that fails; unwritten records are kept.
        """
        self._append()
        durable.sync_file(self.path)

    def _append(self) -> None:
        if self._pending:
            durable.append_bytes(self.path, self._pending)
            self._pending = b""


def _keep_damaged(path: Path) -> Path | None:
    """Copy a file with damaged lines, which holds more than its records, under a free name."""
    if not damage_in(path):
        return None
    names = (path.with_name(f"{path.stem}.damaged-{n:03d}{path.suffix}") for n in count(1))
    kept = next(name for name in names if not os.path.lexists(name))
    durable.write_durably([kept], path.read_bytes())
    return kept
