"""metrics.jsonl: one JSON object a line for each log and each evaluation of a run.

Every object has `kind` ("train" or "eval"), `step` (finished updates) and `bytes` (of text in that
many steps of the run's B and T). What depends on the clock is in `seconds` (since the run began,
across resumes) and `bytes_per_s`; everything else is the same in every run of the same config on
the same machine.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from niels_gpt.config import parse_json
from niels_gpt.files import durable

CLOCK_FIELDS = ("seconds", "bytes_per_s")

Record = dict[str, Any]


def read_metrics(path: Path) -> list[Record]:
    """Return the records of a file up to the first line that is not one; [] without a file."""
    records: list[Record] = []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return records
    for line in lines:
        try:
            record = parse_json(line.decode())
        except ValueError:  # cut off by a power failure
            break
        if not _is_record(record):
            break
        records.append(record)
    return records


def _is_record(value: object) -> bool:
    """Tell whether a value has what its readers rely on."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("kind"), str)
        and isinstance(value.get("step"), int)
        and isinstance(value.get("seconds", 0.0), int | float)
    )


def records_until(records: Iterable[Record], step: int, evaluated: int | None) -> list[Record]:
    """Keep what a checkpoint of `step` knows, whose last evaluation was after `evaluated`."""
    last = {"train": step, "eval": -1 if evaluated is None else evaluated}
    return [r for r in records if r["step"] <= last.get(r.get("kind", ""), -1)]


def to_lines(records: Iterable[Record]) -> bytes:
    """Encode records, one JSON object a line."""
    return b"".join(json.dumps(r, allow_nan=False).encode() + b"\n" for r in records)


class MetricsFile:
    """Appends records to a file once that file is claimed; keeps them until then."""

    def __init__(self, path: Path, records: Iterable[Record] = ()) -> None:
        self.path = path
        self._pending = to_lines(records)
        self._claimed = False

    def add(self, record: Record) -> None:
        """Append a record; it is durable after the next `sync`.

        Raises:
            OSError: if it cannot be written now; it is kept and comes with the next one.
        """
        self._pending += to_lines([record])
        if self._claimed:
            self._append()

    def claim(self) -> None:
        """Replace the file by the records so far."""
        durable.write_durably([self.path], self._pending)
        self._pending = b""
        self._claimed = True

    def sync(self) -> None:
        """Make all records durable.

        Raises:
            OSError: if that fails; what could not be written is kept.
        """
        self._append()
        durable.sync_file(self.path)

    def _append(self) -> None:
        if self._pending:
            durable.append_bytes(self.path, self._pending)
            self._pending = b""
