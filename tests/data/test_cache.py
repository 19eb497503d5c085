"""Whatever happens to the files of a cached stream, what is served is what was cached."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from niels_gpt.data.cache import DamagedCacheError, digest, read_stream, write_streams
from niels_gpt.files.durable import lock_folder

INPUTS = {"source": "roam", "files": [{"path": "/ü\udcff.md", "size": 3}], "val_frac": 0.1}
STREAM = digest(bytes(range(200)))


@pytest.fixture
def cached(tmp_path):
    write_streams(tmp_path / "a/b", [("s", INPUTS, STREAM)])
    return tmp_path / "a/b"


def read(folder: Path):
    try:
        return read_stream(folder, "s", INPUTS)
    except DamagedCacheError:
        return None


def test_what_was_cached_is_served_for_equal_inputs_only(cached):
    assert read_stream(cached, "s", json.loads(json.dumps(INPUTS))) == STREAM
    assert read_stream(cached, "s", {**INPUTS, "val_frac": 0.2}) is None
    assert read_stream(cached, "s", {**INPUTS, "more": None}) is None
    assert read_stream(cached, "t", INPUTS) is None
    assert read_stream(cached / "none", "s", INPUTS) is None


@settings(max_examples=200)
@given(st.sampled_from(["s.bin", "s.meta.json"]), st.data())
def test_damage_is_never_served(cached, name, data):
    whole = (cached / name).read_bytes()
    start = data.draw(st.integers(0, len(whole)), label="start")
    end = data.draw(st.integers(start, len(whole)), label="end")
    flipped = bytes(byte ^ 1 for byte in whole[start:end])
    patch = data.draw(st.binary(max_size=9) | st.sampled_from([whole[start:end], flipped]))
    (cached / name).write_bytes(whole[:start] + patch + whole[end:])
    assert read(cached) in (None, STREAM)
    if name == "s.bin" and whole[:start] + patch + whole[end:] != whole:
        with pytest.raises(DamagedCacheError, match=r"s\.bin does not match the length"):
            read_stream(cached, "s", INPUTS)
    (cached / name).write_bytes(whole)
    assert read(cached) == STREAM


def test_a_missing_stream_is_damage_and_a_missing_meta_is_nothing(cached):
    (cached / "s.bin").unlink()
    with pytest.raises(DamagedCacheError, match=r"s\.bin cannot be read \(No such file"):
        read_stream(cached, "s", INPUTS)
    (cached / "s.meta.json").unlink()
    assert read_stream(cached, "s", INPUTS) is None


def test_a_writer_leaves_the_folder_to_another_one(cached):
    with lock_folder(cached):
        write_streams(cached, [("s", INPUTS, digest(b"other"))])
    assert read_stream(cached, "s", INPUTS) == STREAM


def test_what_a_killed_writer_left_half_written_is_removed(cached):
    left = cached / f".s.bin.{'0' * 16}.tmp"
    left.write_bytes(b"half")
    write_streams(cached, [("s", INPUTS, STREAM)])
    assert not left.exists()
    assert read(cached) == STREAM
