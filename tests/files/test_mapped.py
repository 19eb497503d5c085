"""A mapped file is used as bytes are."""

import gc
import hashlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.batching import get_batch
from niels_gpt.files import mapped
from niels_gpt.files.mapped import MappedBytes, chunks, open_bytes
from niels_gpt.rng import make_generator

DATA = bytes(range(256)) * 40
ends = st.none() | st.integers(-11_000, 11_000)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("mapped") / "a.bin"
    path.write_bytes(DATA)
    return path


@given(start=ends, stop=ends, step=st.sampled_from([None, 1, 3, -2]))
def test_slices_are_bytes_and_those_of_bytes(path, start, stop, step):
    piece = MappedBytes(path)[start:stop:step]
    assert isinstance(piece, bytes)
    assert piece == DATA[start:stop:step]


def test_it_is_equal_to_bytes_of_the_same_content_only(path, monkeypatch):
    monkeypatch.setattr(mapped, "CHUNK", 1000)
    text = MappedBytes(path)
    assert text == DATA
    assert DATA == text  # noqa: SIM300  # bytes ask it too
    assert text == MappedBytes(path)
    for other in (DATA[:-1], DATA + b"x", DATA[:-1] + b"x", "text", None):
        assert text != other
        assert other != text
    assert bytes(text) == memoryview(text) == DATA
    assert (len(text), text[7], text[-1]) == (len(DATA), 7, 255)
    assert b"".join(chunks(text)) == DATA
    assert hashlib.sha256(text).digest() == hashlib.sha256(DATA).digest()


def test_batches_are_those_of_bytes(path):
    def batch(stream):
        sources, generator = {"a": stream}, make_generator(3)
        return get_batch(sources, p={"a": 1.0}, B=4, T=9, device="cpu", generator=generator)

    for mine, other in zip(batch(MappedBytes(path)), batch(DATA), strict=True):
        assert mine.equal(other)


def test_a_file_that_is_replaced_is_read_on(tmp_path):
    (tmp_path / "a").write_bytes(b"old text")
    (tmp_path / "b").write_bytes(b"new")
    text = MappedBytes(tmp_path / "a")
    os.replace(tmp_path / "b", tmp_path / "a")
    assert (text[:3], text) == (b"old", b"old text")


def test_a_file_that_is_cut_off_is_an_error(tmp_path):
    (tmp_path / "a").write_bytes(DATA)
    text = MappedBytes(tmp_path / "a")
    os.truncate(tmp_path / "a", 100)
    with pytest.raises(OSError, match="shorter"):
        text[50:200]


def test_no_descriptor_is_left_open(path):
    gc.collect()  # what earlier tests left
    before = len(os.listdir("/dev/fd"))
    texts = [MappedBytes(path) for _ in range(5)]
    assert len(os.listdir("/dev/fd")) > before
    del texts
    gc.collect()
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize(("size", "kind"), [(99, bytes), (100, MappedBytes), (0, bytes)])
def test_only_large_files_are_mapped(tmp_path, monkeypatch, size, kind):
    monkeypatch.setattr(mapped, "MAPPED_FROM", 100)
    (tmp_path / "a").write_bytes(b"x" * size)
    text = open_bytes(tmp_path / "a")
    assert type(text) is kind
    assert text == b"x" * size
