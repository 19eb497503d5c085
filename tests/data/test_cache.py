"""Whatever happens to the files of a cached stream, what is served is what was cached."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from niels_gpt.data import cache
from niels_gpt.data.cache import (
    DamagedCacheError,
    Stream,
    digest,
    keep_seals,
    read_stream,
    seal,
    write_streams,
)
from niels_gpt.files import mapped
from niels_gpt.files.durable import lock_folder
from niels_gpt.files.mapped import MappedBytes

INPUTS = {"source": "roam", "files": [{"path": "/ü\udcff.md", "size": 3}], "val_frac": 0.1}
STREAM = digest(bytes(range(200)))


@pytest.fixture
def cached(tmp_path):
    write_streams(tmp_path / "a/b", [("s", INPUTS, STREAM.data, {})])
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
        write_streams(cached, [("s", INPUTS, b"other", {})])
    assert read_stream(cached, "s", INPUTS) == STREAM


def test_what_a_killed_writer_left_half_written_is_removed(cached):
    left = cached / f".s.bin.{'0' * 16}.tmp"
    left.write_bytes(b"half")
    write_streams(cached, [("s", INPUTS, STREAM.data, {})])
    assert not left.exists()
    assert read(cached) == STREAM


# --- large streams -----------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A cached stream that counts as large."""
    monkeypatch.setattr(mapped, "MAPPED_FROM", len(STREAM.data))
    write_streams(tmp_path / "large", [("s", INPUTS, STREAM.data, {})])
    return tmp_path / "large"


@pytest.fixture
def hashed(monkeypatch):
    """What is hashed to be served."""
    seen = []
    monkeypatch.setattr(cache, "digest", lambda data: seen.append(bytes(data)) or digest(data))
    return seen


def test_a_large_stream_is_mapped_and_known_by_its_file(large, hashed):
    (written,) = write_streams(large, [("s", INPUTS, STREAM.data, {"documents": 2})])
    assert type(written.data) is MappedBytes
    assert written == STREAM._replace(report={"documents": 2})
    assert read_stream(large, "s", INPUTS) == written
    assert hashed == []
    assert read_stream(large, "s", INPUTS, verify=True) == written
    assert hashed == [STREAM.data]


def flipped(path):
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    return bytes(data)


def test_whoever_writes_to_a_large_file_is_found_out(large):
    path = large / "s.bin"
    before = path.stat()
    path.write_bytes(flipped(path))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as tools that restore files do
    with pytest.raises(DamagedCacheError, match=r"s\.bin does not match"):
        read_stream(large, "s", INPUTS)
    path.write_bytes(flipped(path))
    assert read_stream(large, "s", INPUTS) == STREAM


def test_a_bit_that_the_disk_lost_is_found_by_verifying(large):
    path, meta = large / "s.bin", large / "s.meta.json"
    path.write_bytes(flipped(path))
    kept = json.loads(meta.read_text())
    kept["seal"] = seal(Stream(MappedBytes(path), STREAM.sha256))  # as if nobody had written
    meta.write_text(json.dumps(kept))
    assert read_stream(large, "s", INPUTS).data != STREAM.data
    with pytest.raises(DamagedCacheError, match=r"s\.bin does not match"):
        read_stream(large, "s", INPUTS, verify=True)


def test_a_digest_that_was_changed_is_not_believed(large):
    meta = large / "s.meta.json"
    meta.write_text(meta.read_text().replace(STREAM.sha256, "0" * 64))
    with pytest.raises(DamagedCacheError, match=r"s\.bin does not match"):
        read_stream(large, "s", INPUTS)


def test_a_copied_cache_is_hashed_once(large, tmp_path, hashed):
    shutil.copytree(large, tmp_path / "copy")
    stream = read_stream(tmp_path / "copy", "s", INPUTS)
    assert stream == STREAM
    assert hashed == [STREAM.data]
    keep_seals(tmp_path / "copy", [("s", stream)])
    assert read_stream(tmp_path / "copy", "s", INPUTS) == STREAM
    assert hashed == [STREAM.data]


def test_a_small_stream_is_hashed_each_time(cached, hashed):
    assert read_stream(cached, "s", INPUTS) == STREAM
    assert read_stream(cached, "s", INPUTS) == STREAM
    assert hashed == [STREAM.data] * 2
    assert "seal" not in json.loads((cached / "s.meta.json").read_text())
