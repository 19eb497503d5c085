"""The records of a run: appended, kept while they cannot be, cut back to a checkpoint."""

import errno

import pytest

from niels_gpt.files import durable
from niels_gpt.run.metrics import MetricsFile, read_metrics, records_until, to_lines

A, B, C = ({"kind": "train", "step": step, "seconds": 0.5 * step} for step in (1, 2, 3))
EVAL = {"kind": "eval", "step": 3, "val_wiki_loss": 2.5, "seconds": 2.0}


def test_records_come_back_as_they_were_written(tmp_path):
    (tmp_path / "m").write_bytes(to_lines([A, B, C, EVAL]))
    assert read_metrics(tmp_path / "m") == [A, B, C, EVAL]
    assert read_metrics(tmp_path / "none") == []


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind": "train", "st',
        b"\xff",
        b"[]",
        b"1",
        b"",
        b'{"kind": [], "step": 1, "seconds": 1}',
        b'{"kind": "train", "step": "1", "seconds": 1}',
        b'{"kind": "train", "step": 1, "seconds": "x"}',
        b'{"kind": "train", "step": 1, "seconds": NaN}',
        b'{"kind": "train", "step": 1, "seconds": 1e999}',
    ],
)
def test_reading_ends_at_the_first_line_that_is_no_record(tmp_path, line):
    (tmp_path / "m").write_bytes(to_lines([A]) + line + b"\n" + to_lines([B]))
    assert read_metrics(tmp_path / "m") == [A]


def test_a_checkpoint_knows_the_logs_up_to_it_and_the_evaluations_up_to_its_last():
    records = [A, B, C, EVAL, {"kind": "train", "step": 4, "seconds": 3}]
    assert records_until(records, 2, None) == [A, B]
    assert records_until(records, 3, None) == [A, B, C]  # killed in the evaluation after step 3
    assert records_until(records, 3, 3) == [A, B, C, EVAL]
    assert records_until([{"kind": "other", "step": 1}], 3, 3) == []


def test_nothing_is_written_before_the_claim_and_all_of_it_with_it(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(to_lines([EVAL]))
    metrics = MetricsFile(path, [A])
    metrics.add(B)
    assert read_metrics(path) == [EVAL]
    metrics.claim()
    metrics.add(C)
    metrics.sync()
    assert read_metrics(path) == [A, B, C]


def test_what_cannot_be_written_comes_with_the_next(tmp_path, monkeypatch):
    metrics = MetricsFile(tmp_path / "m")
    metrics.claim()

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(durable, "append_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            metrics.add(A)
    metrics.add(B)
    assert read_metrics(tmp_path / "m") == [A, B]
