"""Any text as a source: what is read, and how it is split."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt import paths
from niels_gpt.data import cache
from niels_gpt.data.documents import Document, split_bytes, split_documents
from niels_gpt.data.recipe import Reading
from niels_gpt.data.roam import split_roam_paths
from niels_gpt.data.sources import SOURCES, Given
from niels_gpt.data.text import is_text
from niels_gpt.streams import StreamBuildConfig, build_sources, describe_sources, locate


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REPO_ROOT", tmp_path / "root")


def built(*places, **changes):
    cfg = {"T": 1, "enabled_sources": ("text",), "required_sources": (), **changes}
    return build_sources(StreamBuildConfig(places={"text": tuple(places)}, **cfg))


def made(*places, **changes):
    """Build without cache; return what reading showed too."""
    how = Reading(places[0], 42, "\n\n", 0.1, None, False, more=places[1:])
    (recipe,) = SOURCES["text"].recipes(how._replace(**changes))
    found = recipe.build()
    train, val = (b"".join(cache.parts(text)) for text in found[:2])
    return found._replace(train=train, val=val)


# --- one file, or few ----------------------------------------------------------------------------


@given(st.text("ab\n é🌱", max_size=300), st.floats(0, 0.9))
def test_the_parts_of_a_text_are_the_text_and_no_character_is_cut(text, val_frac):
    data = text.encode()
    train, val = split_bytes(data, val_frac=val_frac)
    assert train + val == data
    assert (train.decode() + val.decode()) == text
    assert len(val) <= val_frac * len(data) + 0.5


@pytest.mark.parametrize(
    ("end", "at"),
    [
        ("b" * 4 + "\n" + "b" + "\n\n" + "b" * 12, 88),  # a blank line, though a line ends before
        ("b" * 4 + "\n" + "b" * 15, 85),
        ("b" * 11 + "\n\n" + "b" * 7, 80),  # too late
        ("é" * 10, 80),
        ("b" * 20, 80),
    ],
)
def test_validation_begins_at_a_boundary_in_the_first_half_of_the_end(end, at):
    text = ("a" * 80 + end).encode()[:100]
    train, _ = split_bytes(text, val_frac=0.2)
    assert len(train) == at


def test_the_end_of_a_file_is_for_validation(tmp_path):
    lines = [f"line {n}\n" for n in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    train, val = built(tmp_path / "a.txt")
    whole = "".join(lines).encode()
    assert train["text"] + val["text"] == whole
    assert 0.05 * len(whole) < len(val["text"]) <= 0.1 * len(whole)
    info = describe_sources(train)["text"]
    assert (info.origin, info.place) == ("text", str(tmp_path / "a.txt"))


def test_few_files_are_each_split(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.txt").write_text(f"{n} is a number\n" * 100)
    found = made(*(tmp_path / f"{n}.txt" for n in range(3)))
    assert found.documents == (3, 3)
    assert all(b"%d is" % n in part for n in range(3) for part in (found.train, found.val))


# --- many files ----------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path):
    for n in range(30):
        file = tmp_path / f"many/{n % 3}/café {n}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text {n}\n" * 5)
    return tmp_path / "many"


def test_many_files_are_split_by_document_as_notes_are(many):
    found = made(many)
    assert found.documents == (27, 3)
    _, val = split_roam_paths([*many.rglob("*.txt")], seed=42, root=many)
    texts = {path.read_bytes().strip() for path in val}
    assert {part.strip() for part in found.val.split(b"\n\n")} == texts


def test_a_move_of_the_folder_leaves_the_split_alone(many, tmp_path):
    before = made(many)
    many.rename(tmp_path / "elsewhere")
    assert made(tmp_path / "elsewhere")[:2] == before[:2]


@given(st.lists(st.integers(1, 50), min_size=10, max_size=40), st.integers(0, 9))
def test_documents_are_covered_once(sizes, seed):
    documents = [Document(str(i), b"%d " % i * size) for i, size in enumerate(sizes)]
    train, val = split_documents(documents, val_frac=0.1, seed=seed)
    for document in documents:  # what is for training comes before what is for validation
        parts = [part.text for part in train + val if part.key == document.key]
        assert b"".join(parts) == document.text
    if max(len(text) for _, text in documents) * 5 <= sum(len(text) for _, text in documents):
        assert len(val) == len(sizes) // 10
        assert sorted(train + val) == sorted(documents)


def test_of_a_file_with_most_of_the_text_the_end_is_for_validation(many):
    (many / "novel.txt").write_text("a long line of a novel\n" * 999)
    found = made(many)
    assert found.documents == (28, 4)
    assert 0.05 < len(found.val) / len(found.train) < 0.12


# --- what is read --------------------------------------------------------------------------------


def test_of_a_folder_all_text_is_read_and_nothing_else(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    texts = {"a.txt": "plain", "b.md": "# marked", "deep/c": "no suffix", "d.py": "x = 1"}
    for name, text in texts.items():
        (folder / name).write_text(text * 20 + "\r\n")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "blank.txt").write_text(" \n")
    (folder / "picture.png").write_bytes(bytes(range(256)) * 9)
    (folder / "latin.txt").write_bytes("naïve text, mostly plain".encode("latin-1"))
    for _ in range(2):  # built, then from the cache
        train, val = built(folder)
        stream = train["text"] + val["text"]
        assert all(text.encode() in stream for text in texts.values())
        assert b"\r" not in stream
        assert b"hidden" not in stream
        told = "; ".join(train.messages)
        assert f"1 left out: {folder}/picture.png: no text, or not in UTF-8" in told
        assert "1 empty file left out" in told
        assert "latin.txt: not UTF-8: 1 characters were replaced" in told


def test_a_file_that_is_named_twice_counts_once(many):
    one = many / "0/café 0.txt"
    assert made(many, one).documents == (27, 3)
    assert made(one, one).documents == (1, 1)


@pytest.mark.parametrize("suffix", ["", ".txt"])
@pytest.mark.parametrize("data", [b"", b"\n \n", b"\x89PNG\0", "кириллица".encode("cp1251") * 9])
def test_a_file_that_is_named_and_no_text_is_an_error(many, tmp_path, data, suffix):
    bad = tmp_path / f"bad{suffix}"
    bad.write_bytes(data)
    with pytest.raises(RuntimeError, match=r"source 'text' cannot be built: .*bad.*: (is|no text)"):
        built(many, bad)


def test_text_is_told_from_binary_data():
    assert is_text("plain, naïve, кириллица, 🌱\n".encode())
    assert is_text("UTF-16 with its mark".encode("utf-16"))
    assert is_text("mostly plain, and naïve".encode("latin-1"))
    assert not is_text("UTF-16 without its mark".encode("utf-16-le"))
    assert not is_text(bytes(range(1, 256)))


def test_streams_are_cached_until_a_file_changes(many, tmp_path):
    first, _ = built(many)
    binary = tmp_path / "root/data/cache/streams/text_train.bin"
    before = binary.stat()
    again, _ = built(many)
    assert again["text"] == first["text"]
    assert binary.stat().st_mtime_ns == before.st_mtime_ns
    (many / "0/café 0.txt").write_text("changed " * 9)
    changed, val = built(many)
    assert b"changed" in changed["text"] + val["text"]


def test_lines_of_machine_data_can_be_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("a line\n" * 40 + "iVBOR" * 900 + "\n" + "b line\n" * 40)
    kept, cut = (built(tmp_path / "a.txt", skip_machine_lines=skip)[0] for skip in (False, True))
    assert b"iVBOR" in kept["text"]
    assert b"iVBOR" not in cut["text"]
    assert describe_sources(cut)["text"].origin == "text without machine lines"


def test_a_place_that_is_neither_file_nor_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="this is a special file; it must be a file or a folder"):
        locate(Given({"text": (tmp_path / "pipe",)}))
    with pytest.raises(FileNotFoundError, match=r"--text .*gone: no such file or folder"):
        locate(Given({"text": (tmp_path, tmp_path / "gone")}))
