"""metrics.jsonl: one JSON object per line for each log and each evaluation of a run.

Every object has `kind` ("train" or "eval"), `step` (finished updates) and `bytes` (of text in that
many steps with the run's B and T). Only `seconds` (training time, across resumes) and
`bytes_per_s` depend on the clock; all else is equal in every run of the same config on the same
machine.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from niels_gpt.files import durable
from niels_gpt.files.strict_json import parse_json

CLOCK_FIELDS = ("seconds", "bytes_per_s")

Record = dict[str, Any]


def read_metrics(path: Path) -> list[Record]:
    """Return the records of a file up to the first invalid line; [] if there is no file."""
    records: list[Record] = []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return records
    for line in lines:
        try:
            record = parse_json(line.decode())
            to_lines([record])
        except ValueError:  # cut off by a power failure, or a number that is not finite
            break
        if not _is_record(record):
            break
        records.append(record)
    return records


def _is_record(value: object) -> bool:
    """Return whether a value has the fields that readers rely on."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("kind"), str)
        and isinstance(value.get("step"), int)
        and isinstance(value.get("seconds", 0.0), int | float)
    )


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

    def claim(self) -> None:
        """Replace the file by the records so far."""
        durable.write_durably([self.path], self._pending)
        self._pending = b""
        self._claimed = True

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
