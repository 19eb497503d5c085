"""The records of a run: appended, kept while they cannot be, cut back to a checkpoint."""

import codecs
import errno

import pytest

from niels_gpt.files import durable
from niels_gpt.run.metrics import MetricsFile, damage_in, read_metrics, records_until, to_lines

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
        b"\0" * 40,
        b"\0\0" + to_lines([B])[:-1],
        b'{"kind": [], "step": 1, "seconds": 1}',
        b'{"kind": "train", "step": "1", "seconds": 1}',
        b'{"kind": "train", "step": 1, "seconds": "x"}',
        b'{"kind": "train", "step": 1, "seconds": NaN}',
        b'{"kind": "train", "step": 1, "seconds": 1e999}',
    ],
)
@pytest.mark.parametrize("first", [0, 1])
def test_a_line_that_is_no_record_is_named_and_what_follows_is_read(tmp_path, line, first):
    (tmp_path / "m").write_bytes(to_lines([A] * first) + line + b"\n" + to_lines([B, C]))
    assert read_metrics(tmp_path / "m") == [*[A] * first, B, C]
    (message,) = damage_in(tmp_path / "m")
    assert message == f"{tmp_path / 'm'}: skipped what is not a record, in line {first + 1}"


@pytest.mark.parametrize(
    "data",
    [
        to_lines([A, B]),
        codecs.BOM_UTF8 + to_lines([A, B]),
        b"\n\r\n \t\n" + to_lines([A]) + b"\n\n" + to_lines([B]) + b"\n",
        to_lines([A, B]).replace(b"\n", b"\r\n"),
        to_lines([A, B])[:-1],
        to_lines([A, B, C])[:-9],
        to_lines([A, B]) + b"\0" * 4096,
        to_lines([A, B]) + b'{"kind": "\xff',
    ],
)
def test_blank_lines_a_mark_in_front_and_a_cut_end_are_not_worth_a_word(tmp_path, data):
    (tmp_path / "m").write_bytes(data)
    assert read_metrics(tmp_path / "m") == [A, B]
    assert damage_in(tmp_path / "m") == []


def test_of_many_damaged_lines_the_first_are_named(tmp_path):
    (tmp_path / "m").write_bytes(b"x\n" * 9 + to_lines([A]) + b"x\n")
    (message,) = damage_in(tmp_path / "m")
    assert message.endswith("in lines 1, 2, 3, 4, 5 and 5 more")
    assert damage_in(tmp_path / "none") == []


def test_a_damaged_file_is_kept_when_it_is_replaced(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for n, data in enumerate((b"x\n" + to_lines([A]), b"\0\n"), 1):
        path.write_bytes(data)
        kept = MetricsFile(path, [B]).claim()
        assert kept == tmp_path / f"metrics.damaged-00{n}.jsonl"
        assert kept.read_bytes() == data
        assert read_metrics(path) == [B]
    assert MetricsFile(path, [C]).claim() is None
    assert len(list(tmp_path.iterdir())) == 3


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
