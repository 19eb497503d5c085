"""Laws of the streams: their content, the origin of the wiki text, and an honest cache."""

import codecs
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tracemalloc
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt import paths, streams
from niels_gpt.batching import get_batch, renormalise
from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.data import DIALOGUE_DELIM, cache, primer, python_docs, roam, wiki
from niels_gpt.files import mapped
from niels_gpt.files.mapped import MappedBytes
from niels_gpt.streams import (
    StreamBuildConfig,
    build_primer_stream,
    build_roam_stream,
    build_sources,
    build_train_val_sources,
    build_wiki_stream,
    describe_sources,
)
from tests import ROOT, SHARED

WIKITEXT = {"train": [f" line {i} of the train split \n" for i in range(9)], "val": ["a val"] * 9}
PYTHON_DOCS = {"train": ["the documentation of Python"] * 3, "val": ["a bit more of it"]}
DIALOGUES = [f"user: question {i}\nassistant: answer {i}\n" for i in range(12)]
NAMES = ("wiki", "roam", "primer")


def no_wikitext() -> dict[str, list[str]]:
    raise ConnectionError("no\nnetwork")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Lay out a root with notes, a primer and a separate wiki folder; no network, short docs."""
    for i in range(20):
        note = tmp_path / "notes" / f"🗂 {i % 3}" / f"{i}.md"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_bytes(f"# Note {i}\r\nsome text of note {i}\n".encode())
    (tmp_path / "primer.txt").write_text(DIALOGUE_DELIM.join(DIALOGUES))
    (tmp_path / "wiki").mkdir()
    (tmp_path / "wiki/train.txt").write_bytes("The train text, with a line end: é\r\n".encode() * 9)
    (tmp_path / "wiki/val.txt").write_bytes(b"The val text.\n" * 3)
    monkeypatch.setattr(paths, "REPO_ROOT", tmp_path)
    monkeypatch.setattr(streams, "load_wikitext", no_wikitext)
    monkeypatch.setattr(wiki, "load_python_docs", lambda: PYTHON_DOCS)
    return tmp_path


def config(home: Path, **changes) -> StreamBuildConfig:
    """Name all sources of `home`, with a T short enough for them."""
    cfg = StreamBuildConfig(
        roam_root=home / "notes", primer_path=home / "primer.txt", wiki_root=home / "wiki", T=8
    )
    return replace(cfg, **changes)


def wiki_only(home: Path, **changes) -> StreamBuildConfig:
    return config(
        home,
        **{
            "wiki_root": None,
            "enabled_sources": ("wiki",),
            "required_sources": ("wiki",),
            **changes,
        },
    )


def cache_files(home: Path) -> dict[str, Path]:
    folder = home / "data/cache/streams"
    return {path.name: path for path in folder.iterdir() if not path.name.startswith(".")}


def stamps(home: Path) -> dict[str, tuple[int, int]]:
    files = {name: path.stat() for name, path in cache_files(home).items()}
    return {name: (status.st_mtime_ns, status.st_ino) for name, status in files.items()}


# --- texts to bytes ----------------------------------------------------------------------------

texts = st.lists(st.text(st.characters(codec="utf-8"), max_size=9), max_size=6)


@given(texts, st.sampled_from(["\n\n", "", "\n---\n", " é "]))
def test_streams_are_the_documents_joined_as_utf8(docs, sep):
    expected = sep.join(docs).encode()
    assert build_wiki_stream(docs, sep=sep) == expected
    assert build_roam_stream(docs, sep=sep) == expected
    assert build_primer_stream(sep.join(docs)) == expected


@given(st.text(st.characters(), max_size=9))
def test_any_str_becomes_valid_utf8(text):
    for stream in (build_wiki_stream([text], sep=""), build_primer_stream(text)):
        assert len(stream.decode()) == len(text)


# --- what is in the streams --------------------------------------------------------------------


def test_each_stream_holds_its_source_and_the_splits_part_it_by_document(home):
    train, val = build_sources(config(home))
    assert tuple(train) == tuple(val) == NAMES
    assert train["wiki"] == (home / "wiki/train.txt").read_bytes()
    assert val["wiki"] == (home / "wiki/val.txt").read_bytes()

    notes = [path.read_text().encode() for path in (home / "notes").rglob("*.md")]  # \n for \r\n
    halves = [half["roam"].split(b"\n\n#") for half in (train, val)]
    assert [len(half) for half in halves] == [18, 2]
    assert sorted(b"#" + n.strip(b"#\n") for half in halves for n in half) == sorted(
        n.strip() for n in notes
    )

    halves = [half["primer"].decode().split(DIALOGUE_DELIM) for half in (train, val)]
    assert [len(half) for half in halves] == [11, 1]
    assert sorted(halves[0] + halves[1]) == sorted(d.strip() for d in DIALOGUES)


def test_a_batch_can_be_drawn_from_what_was_built(home):
    train, _ = build_sources(config(home))
    p = renormalise(TrainConfig().p_train, train)
    x, _ = get_batch(train, p=p, B=4, T=8, device="cpu")
    assert x.shape == (4, 8)


def test_streams_do_not_depend_on_the_process_nor_on_where_the_folders_lie(home):
    code = (
        "import sys; from niels_gpt.streams import *;"
        "root = Path(sys.argv[1]);"
        "cfg = StreamBuildConfig(roam_root=root/'notes', primer_path=root/'primer.txt',"
        "  wiki_root=root/'wiki', T=8, write_cache=False, cache_dir=root/'none');"
        "print([d[s].sha256 for d in map(describe_sources, build_sources(cfg)) for s in d])"
    )
    shutil.copytree(home, home / "moved/.hidden", ignore=shutil.ignore_patterns("moved"))
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, str(root)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for root, seed in [(home, "1"), (home / "moved/.hidden", "2")]
    ]
    assert runs[0] == runs[1]
    infos = [
        info for half in build_sources(config(home)) for info in describe_sources(half).values()
    ]
    assert runs[0] == f"{[info.sha256 for info in infos]}\n"


def test_a_note_in_a_new_folder_leaves_the_split_of_the_others_alone(home):
    (home / "notes").rename(home / "folder")
    (home / "notes").mkdir()
    (home / "folder").rename(home / "notes/folder")

    def val_notes() -> set[bytes]:
        return {*build_sources(config(home, roam_val_frac=0.5))[1]["roam"].split(b"\n\n#")}

    before = val_notes()
    (home / "notes/new.md").write_text("# Note 20\n")
    assert len(val_notes() - before) <= 2  # the new one and its neighbour at the boundary


def test_left_out_notes_are_told_except_those_left_out_by_design(home):
    (home / "notes/.obsidian").mkdir()
    assert build_sources(config(home))[0].messages == []
    (home / "notes/gone.md").symlink_to(home / "nowhere")
    train, val = build_sources(config(home))
    assert train.messages == val.messages
    assert "gone.md: No such file" in train.messages[0]


# --- text as files hold it ---------------------------------------------------------------------


def in_roam(cfg):
    """Return the streams of the notes together, and what is told of them."""
    train, val = build_sources(cfg)
    assert build_sources(cfg)[0].messages == train.messages  # from the cache
    return train["roam"] + cfg.doc_separator.encode() + val["roam"], train.messages


ODD = {
    "utf-8 with a mark": ("déjà vu\r\n".encode("utf-8-sig"), ""),
    "utf-16": (
        codecs.BOM_UTF16_BE + "déjà vu\r".encode("utf-16-be"),
        "UTF-16-BE, converted to UTF-8",
    ),
    "old mac": ("déjà vu\r".encode(), ""),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_note_is_text_however_its_file_spells_it(home, odd):
    data, problem = ODD[odd]
    (home / "notes/odd.md").write_bytes(data)
    stream, messages = in_roam(config(home))
    assert "déjà vu\n".encode() in stream
    assert b"\r" not in stream
    assert "\ufeff".encode() not in stream
    told = f"roam: 1 not plain UTF-8: {home / 'notes/odd.md'}: {problem}"
    assert messages == ([told] if problem else [])


def test_what_is_not_utf8_is_told_of_every_source(home):
    latin = "user: déjà vu\n".encode("latin-1")
    (home / "notes/odd.md").write_bytes(latin)
    (home / "primer.txt").write_bytes(DIALOGUE_DELIM.encode().join([latin * 2, latin * 3]))
    (home / "wiki/train.txt").write_bytes(latin * 9)
    (home / "wiki/val.txt").write_bytes(codecs.BOM_UTF16_LE + "val".encode("utf-16-le") * 9)
    train, val = build_sources(config(home))
    assert train["wiki"] == latin * 9
    assert val["wiki"] == (home / "wiki/val.txt").read_bytes()
    assert [message.replace(str(home), "") for message in train.messages] == [
        "wiki: 2 not plain UTF-8: /wiki/train.txt: not UTF-8: 18 invalid characters, used as they "
        "are; /wiki/val.txt: UTF-16-LE, used as it is: save it as UTF-8",
        "roam: 1 not plain UTF-8: /notes/odd.md: not UTF-8: 2 characters were replaced",
        "primer: 1 not plain UTF-8: /primer.txt: not UTF-8: 10 characters were replaced",
    ]
    assert build_sources(config(home))[0].messages == train.messages


@pytest.mark.parametrize("blank", [b"", b" \n\t\r\n", b"\xef\xbb\xbf", "\u3000\n".encode()])
def test_empty_notes_are_left_out_and_counted(home, blank):
    before, _ = in_roam(config(home))
    for i in range(700):
        (home / f"notes/daily {i}.md").write_bytes(blank)
    stream, messages = in_roam(config(home))
    assert stream == before
    assert messages == ["roam: 700 empty notes left out"]
    for i in range(20):
        next((home / "notes").rglob(f"{i}.md")).unlink()
    found = build_sources(config(home, required_sources=("wiki",)))[0].missing["roam"]
    assert found.endswith("have text; 700 empty notes left out")


def test_names_are_the_same_on_macos_and_linux(home):
    """macOS writes an umlaut as two characters, as some file systems keep it."""
    names = [f"Übung {letter}.md" for letter in "äöüabcé"] + ["Ü/a.md", "Uz.md", "Zz.md", "Ux/a.md"]
    for form in ("NFC", "NFD"):
        for name in names:
            note = home / form / unicodedata.normalize(form, name)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"# {name}\n")
    for share in (0.1, 0.3, 0.5):
        linux, mac = (
            build_sources(config(home, roam_root=home / form, roam_val_frac=share, cache_dir=form))
            for form in ("NFC", "NFD")
        )
        assert [half["roam"] for half in linux] == [half["roam"] for half in mac]
    metas = [
        json.loads((home / form / "roam_train.meta.json").read_text()) for form in ("NFC", "NFD")
    ]
    paths_of = [[Path(f["path"]).name for f in meta["files"]] for meta in metas]
    assert paths_of[0] == paths_of[1]


PICTURE = f"![a picture](data:image/png;base64,{'iVBORw0KGgo' * 9000})"


def test_machine_lines_are_told_and_left_out_on_request(home):
    (home / "notes/picture.md").write_text(f"before\n{PICTURE}\nafter\n")
    (home / "notes/only.md").write_text(PICTURE)
    stream, messages = in_roam(config(home))
    assert stream.count(PICTURE.encode()) == 2
    size = f"2 lines of machine data such as embedded pictures, {2 * len(PICTURE):,} bytes"
    assert messages == [f"roam: {size}: read as text (--skip-machine-lines leaves them out)"]
    skipping = config(home, skip_machine_lines=True)
    stream, messages = in_roam(skipping)
    assert b"iVBOR" not in stream
    assert b"before\nafter\n" in stream
    assert messages == ["roam: 1 empty note left out", f"roam: {size}: left out"]
    origin = describe_sources(build_sources(skipping)[0])["roam"].origin
    assert origin == "notes without machine lines"


# --- notes that cannot be read -----------------------------------------------------------------

ERRORS = [  # a bad disk, a cloud placeholder, a network folder that is gone, and the like
    *(errno.EIO, errno.EDEADLK, errno.ETIMEDOUT, errno.ESTALE, errno.ENAMETOOLONG, errno.ENOENT),
    *(errno.EACCES, errno.EPERM, errno.EISDIR),
]


def break_reading(monkeypatch, names, number):
    """Let the files of these names fail when they are read."""
    read_bytes = Path.read_bytes

    def read(path):
        if path.name in names:
            raise OSError(number, os.strerror(number), str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_a_note_that_cannot_be_read_is_left_out_by_name_and_reason(home, monkeypatch, number):
    without = config(home, cache_dir="without")
    (home / "notes/bad.md").write_text("It can be listed, but not read.")
    with monkeypatch.context() as patch:
        break_reading(patch, {"bad.md"}, number)
        train, val = build_sources(config(home))
    message = f"roam: 1 left out: {home / 'notes/bad.md'}: {os.strerror(number)}"
    assert train.messages == val.messages == [message]
    files = json.loads(cache_files(home)["roam_train.meta.json"].read_text())["files"]
    assert sorted(Path(file["path"]).name for file in files) == sorted(f"{i}.md" for i in range(20))
    whole = build_sources(config(home))  # it can be read again
    assert any(b"not read" in half["roam"] for half in whole)
    (home / "notes/bad.md").unlink()
    assert (train, val) == build_sources(without)


def test_a_note_that_vanishes_once_it_was_looked_at_is_left_out(home, monkeypatch):
    stat = Path.stat

    def look(path, **more):
        status = stat(path, **more)
        if path.name == "7.md":
            path.unlink()
        return status

    monkeypatch.setattr(Path, "stat", look)
    train, _ = build_sources(config(home))
    assert "7.md: No such file" in train.messages[0]
    assert {"wiki", "roam", "primer"} == train.keys()


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_notes_none_of_which_can_be_read_are_an_absent_source(home, monkeypatch, number):
    break_reading(monkeypatch, {f"{i}.md" for i in range(20)}, number)
    train, _ = build_sources(config(home, required_sources=("wiki",)))
    assert "can be read; 20 left out: " in train.missing["roam"]
    assert f": {os.strerror(number)}; " in train.missing["roam"]
    assert train.missing["roam"].endswith("; and 17 more, see niels-gpt data info")
    with pytest.raises(RuntimeError, match=os.strerror(number)):
        build_sources(config(home, required_sources=(), places={"roam": home / "notes"}))


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG])
def test_a_folder_that_cannot_be_read_is_not_said_to_have_no_notes(home, monkeypatch, number):
    scandir = os.scandir

    def refuse(folder):
        if Path(folder) == home / "notes":
            raise OSError(number, os.strerror(number), folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    train, _ = build_sources(config(home, required_sources=("wiki",)))
    assert train.missing["roam"] == f"{home / 'notes'} cannot be read: {os.strerror(number)}"


# --- where the wiki text comes from ------------------------------------------------------------


def test_the_origins_come_in_their_order(home, monkeypatch):
    def origin(cfg: StreamBuildConfig) -> str:
        return describe_sources(build_sources(cfg)[0])["wiki"].origin

    cfg = wiki_only(home, wiki_fallback=True)
    assert origin(cfg).startswith("Python ")
    monkeypatch.setattr(streams, "load_wikitext", lambda: WIKITEXT)
    assert origin(cfg) == "WikiText-103"
    shutil.copytree(home / "wiki", home / "data/wiki")
    assert origin(cfg) == "folder"
    (home / "data/wiki/train.txt").write_text("not this one" * 9)
    train, _ = build_sources(replace(cfg, wiki_root=home / "wiki"))
    assert train["wiki"] == (home / "wiki/train.txt").read_bytes()
    assert describe_sources(train)["wiki"].place == str(home / "wiki")


def test_wikitexts_own_file_names_serve_too(home):
    (home / "wiki/train.txt").rename(home / "wiki/wiki.train.raw")
    (home / "wiki/val.txt").rename(home / "wiki/wiki.valid.raw")
    _, val = build_sources(wiki_only(home, wiki_root=str(home / "wiki")))
    assert val["wiki"] == (home / "wiki/wiki.valid.raw").read_bytes()


def test_wikitext_is_joined_by_the_separator(home, monkeypatch):
    monkeypatch.setattr(streams, "load_wikitext", lambda: WIKITEXT)
    train, val = build_sources(wiki_only(home, doc_separator="|"))
    assert train["wiki"] == "|".join(WIKITEXT["train"]).encode()
    assert val["wiki"] == "|".join(WIKITEXT["val"]).encode()


def test_a_warm_wikitext_cache_needs_no_network(home, monkeypatch):
    monkeypatch.setattr(streams, "load_wikitext", lambda: WIKITEXT)
    first = build_sources(wiki_only(home))
    monkeypatch.setattr(streams, "load_wikitext", no_wikitext)
    assert build_sources(wiki_only(home, wiki_fallback=True)) == first


@pytest.mark.parametrize("other", ["folder", "default"])
def test_no_other_text_replaces_a_cached_wikitext(home, monkeypatch, other):
    monkeypatch.setattr(streams, "load_wikitext", lambda: WIKITEXT)
    first = build_sources(wiki_only(home))
    before = stamps(home)
    monkeypatch.setattr(streams, "load_wikitext", no_wikitext)
    root = home / "wiki" if other == "folder" else None
    cfg = wiki_only(home, wiki_root=root, wiki_fallback=True, force_rebuild=True)
    assert build_sources(cfg) != first
    assert stamps(home) == before
    assert build_sources(wiki_only(home)) == first


def test_the_default_is_told_in_one_line_with_the_way_to_the_real_thing(home):
    train, _ = build_sources(wiki_only(home, wiki_fallback=True))
    (note,) = train.messages
    assert note.startswith("wiki: using the fallback text, Python 3")
    assert "--wiki DIR" in note
    assert note.endswith("no network")
    assert "\n" not in note


def test_without_the_fallback_no_text_is_an_error_that_says_why(home):
    with pytest.raises(RuntimeError, match=r"'wiki' cannot be built: no network.*train\.txt"):
        build_sources(wiki_only(home))


@pytest.mark.parametrize("names", [[], ["train.txt"], ["wiki.train.raw", "val.txt"]])
def test_a_wiki_folder_that_was_named_has_to_be_complete(home, names):
    (home / "named").mkdir()
    for name in names:
        (home / "named" / name).write_text("text" * 9)
    with pytest.raises(RuntimeError, match=r"named must have train\.txt and val\.txt"):
        build_sources(wiki_only(home, wiki_root=home / "named", wiki_fallback=True))


# --- the cache ---------------------------------------------------------------------------------


def test_the_cache_has_each_stream_with_its_inputs_beside(home):
    built = dict(zip(("train", "val"), build_sources(config(home)), strict=True))
    files = cache_files(home)
    assert len(files) == 12
    for split, sources in built.items():
        for name, stream in sources.items():
            assert files[f"{name}_{split}.bin"].read_bytes() == stream
            meta = json.loads(files[f"{name}_{split}.meta.json"].read_text())
            assert (meta["source"], meta["split"]) == (name, split)
            assert meta["length"] == len(stream)
            assert meta["sha256"] == hashlib.sha256(stream).hexdigest()
            assert meta["origin"] == describe_sources(sources)[name].origin

    meta = json.loads(files["roam_train.meta.json"].read_text())
    assert (meta["sep"], meta["seed"], meta["val_frac"]) == ("\n\n", 42, 0.1)
    notes = sorted((home / "notes").rglob("*.md"))
    stamps = ["path", "mtime_ns", "size", "ctime_ns", "inode"]
    assert [[file[key] for key in stamps] for file in meta["files"]] == [
        [str(p), s.st_mtime_ns, s.st_size, s.st_ctime_ns, s.st_ino]
        for p in notes
        for s in [p.stat()]
    ]
    meta = json.loads(files["primer_val.meta.json"].read_text())
    assert meta["path"] == str(home / "primer.txt")
    assert (meta["delimiter"], meta["seed"], meta["val_frac"]) == (DIALOGUE_DELIM, 42, 0.1)


def test_unchanged_inputs_leave_the_files_alone(home):
    first = build_sources(config(home))
    before = stamps(home)
    assert build_sources(config(home)) == first
    assert stamps(home) == before
    build_sources(config(home, force_rebuild=True))
    assert all(before[name] != now for name, now in stamps(home).items())


def touch_one_note(home):
    os.utime(next((home / "notes").rglob("7.md")), ns=(1, 1))


def rewrite_in_place(home):
    note = next((home / "notes").rglob("7.md"))
    before = note.stat()
    note.write_bytes(note.read_bytes().replace(b"some", b"SOME"))
    os.utime(note, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_note(home):
    note = next((home / "notes").rglob("7.md"))
    before = note.stat()
    (home / "copy").write_bytes(note.read_bytes().replace(b"some", b"SOME"))
    os.utime(home / "copy", ns=(before.st_atime_ns, before.st_mtime_ns))
    (home / "copy").rename(note)


def shorten_primer(home):
    (home / "primer.txt").write_text(DIALOGUE_DELIM.join(DIALOGUES[:5]))


CHANGES = {
    "a note edited": ("roam", {}, lambda h: (h / "notes/new.md").write_text("more" * 9)),
    "a note touched": ("roam", {}, touch_one_note),
    "a note removed": ("roam", {}, lambda h: next((h / "notes").rglob("3.md")).unlink()),
    "the separator": ("roam", {"doc_separator": "\n---\n"}, None),
    "the share of notes": ("roam", {"roam_val_frac": 0.3}, None),
    "the seed": ("roam primer", {"seed": 43}, None),
    "the primer": ("primer", {}, shorten_primer),
    "a note rewritten in place, its time restored": ("roam", {}, rewrite_in_place),
    "a note replaced, its time restored": ("roam", {}, replace_note),
    "the delimiter": ("primer", {"delimiter": "user:"}, None),
    "the share of dialogues": ("primer", {"primer_val_frac": 0.5}, None),
    "the wiki train file": ("wiki", {}, lambda h: (h / "wiki/train.txt").write_text("new" * 9)),
    "the wiki val file": ("wiki", {}, lambda h: (h / "wiki/val.txt").write_text("new" * 9)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_inputs_are_built_again_and_only_those(home, change):
    changed, options, act = CHANGES[change]
    build_sources(config(home))
    before = stamps(home)
    if act:
        act(home)
    built = build_sources(config(home, **options))
    assert built == build_sources(config(home, **options, cache_dir="elsewhere"))
    renewed = {name for name, now in stamps(home).items() if before[name] != now}
    assert {name.split("_")[0] for name in renewed} == set(changed.split())
    assert len(renewed) == 4 * len(changed.split())


def test_the_same_notes_below_another_folder_are_another_split(home):
    cfg = config(home, roam_val_frac=0.5)
    before = build_sources(cfg)[1]["roam"]
    above = build_sources(replace(cfg, roam_root=home))[1]["roam"]
    assert above == build_sources(replace(cfg, roam_root=home, cache_dir="elsewhere"))[1]["roam"]
    assert above != before


def test_streams_of_an_earlier_builder_are_not_served(home, monkeypatch):
    first = build_sources(config(home))
    before = stamps(home)
    for reader in (roam, primer):
        monkeypatch.setattr(reader, "BUILDER", reader.BUILDER - 1)
    assert build_sources(config(home)) == first
    renewed = {name for name, now in stamps(home).items() if before[name] != now}
    assert {name.split("_")[0] for name in renewed} == {"roam", "primer"}


def test_pythons_documentation_is_known_by_its_content(home, monkeypatch):
    """One version of Python comes in variants: repaired, or without a part of its library."""
    library = home / "library"
    library.mkdir()
    (library / "a.py").write_text('"""The first text of a module."""')
    (library / "b.py").write_text('"""Another module has this text."""')
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    monkeypatch.setattr(wiki, "load_python_docs", python_docs.load_python_docs)
    cfg = wiki_only(home, wiki_fallback=True)
    first = build_sources(cfg)
    before = stamps(home)
    assert build_sources(cfg) == first
    assert stamps(home) == before
    for name in ("a.py", "b.py"):
        (library / name).write_text(f'"""Now {name} has a text of its own."""')
    assert b"of its own" in build_sources(cfg)[0]["wiki"]


@pytest.mark.parametrize("text", ["wiki folder", "WikiText-103", "documentation"])
def test_a_cached_stream_serves_only_its_own_origin(home, monkeypatch, text):
    other = home / "other"
    shutil.copytree(home / "wiki", other)
    (other / "train.txt").write_text("another text" * 9)
    build_sources(wiki_only(home, wiki_root=other))
    build_sources(wiki_only(home, wiki_fallback=True))
    cfg = wiki_only(home, wiki_fallback=True, wiki_root=home / "wiki" if "folder" in text else None)
    if "WikiText" in text:
        monkeypatch.setattr(streams, "load_wikitext", lambda: WIKITEXT)
    assert build_sources(cfg) == build_sources(replace(cfg, cache_dir="elsewhere"))


DAMAGES = {
    "a bit": lambda path, data: path.write_bytes(data[:-1] + bytes([data[-1] ^ 4])),
    "cut": lambda path, data: path.write_bytes(data[:-1]),
    "emptied": lambda path, data: path.write_bytes(b""),
    "zeroed": lambda path, data: path.write_bytes(bytes(len(data))),
    "removed": lambda path, data: path.unlink(),
    "a list": lambda path, data: path.write_bytes(b"[]"),
    "too deep": lambda path, data: path.write_bytes(b"[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["roam_train.bin", "roam_val.meta.json"])
def test_a_damaged_cache_is_not_served_and_made_whole(home, name, damage):
    first = build_sources(config(home))
    before = {name: path.read_bytes() for name, path in cache_files(home).items()}
    DAMAGES[damage](cache_files(home)[name], before[name])
    assert build_sources(config(home)) == first
    assert {name: path.read_bytes() for name, path in cache_files(home).items()} == before


def test_a_damaged_stream_is_told(home):
    build_sources(config(home))
    DAMAGES["a bit"](cache_files(home)["roam_val.bin"], bytes(9))
    train, _ = build_sources(config(home))
    assert len(train.messages) == 1
    assert "roam_val.bin does not match the length and digest" in train.messages[0]


def a_file_for_the_folder(cache_dir):
    cache_dir.parent.mkdir(parents=True)
    cache_dir.write_text("in the way")


def a_folder_for_the_lock(cache_dir):
    (cache_dir / ".niels-gpt.lock").mkdir(parents=True)


def a_folder_for_a_stream(cache_dir):
    (cache_dir / "wiki_train.bin/in the way").mkdir(parents=True)


@pytest.mark.parametrize(
    "obstruct", [a_file_for_the_folder, a_folder_for_the_lock, a_folder_for_a_stream]
)
def test_an_unwritable_cache_is_told_and_done_without(home, obstruct):
    obstruct(home / "data/cache/streams")
    for _ in range(2):
        train, val = build_sources(config(home))
        assert (train, val) == build_sources(config(home, cache_dir="elsewhere"))
        assert train.messages[0].startswith("cache: [Errno")
        assert str(home / "data/cache/streams") in train.messages[0]


def test_the_cache_can_be_left_as_it_is(home):
    first = build_sources(config(home, write_cache=False))
    assert not (home / "data").exists()
    build_sources(config(home))
    before = stamps(home)
    (home / "notes/new.md").write_text("more" * 9)
    assert build_sources(config(home, write_cache=False)) != first
    assert stamps(home) == before


def test_processes_that_build_one_cache_at_once_do_no_harm(home):
    code = (
        "import sys; from niels_gpt.streams import *; root = Path(sys.argv[1]);"
        "sys.stdin.read();"
        "cfg = StreamBuildConfig(roam_root=root/'notes', primer_path=root/'primer.txt',"
        "  wiki_root=root/'wiki', T=8, cache_dir=root/'data/cache/streams', force_rebuild=True);"
        "built = [build_sources(cfg) for _ in range(5)][-1];"
        "print([d[s].sha256 for d in map(describe_sources, built) for s in d], built[0].messages)"
    )
    command = [sys.executable, "-c", code, str(home)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(4)]
    for process in processes:
        process.stdin.close()
        process.stdin = None
    outputs = {process.communicate()[0] for process in processes}
    infos = [i for half in build_sources(config(home)) for i in describe_sources(half).values()]
    assert outputs == {f"{[info.sha256 for info in infos]} []\n"}
    before = stamps(home)
    assert build_sources(config(home))[0].messages == []
    assert stamps(home) == before
    assert len(before) == 12


def test_a_cached_stream_is_held_once_in_memory(home):
    size = 8_000_000
    (home / "wiki/train.txt").write_bytes(b"x" * size)
    cfg = wiki_only(home, wiki_root=home / "wiki")
    build_sources(cfg)
    tracemalloc.start()
    try:
        train, _ = build_sources(cfg)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size == len(train["wiki"]) <= peak < 1.1 * size


def test_large_streams_are_those_that_small_ones_are(home, monkeypatch):
    expected = build_sources(config(home))
    files = {name: path.read_bytes() for name, path in cache_files(home).items()}
    monkeypatch.setattr(mapped, "MAPPED_FROM", 1)
    for cfg in (config(home, force_rebuild=True), config(home), config(home, verify=True)):
        built = build_sources(cfg)
        assert built == expected
        assert [s.messages for s in built] == [[], []]
        assert list(map(describe_sources, built)) == list(map(describe_sources, expected))
        assert all(type(stream) is MappedBytes for s in built for stream in s.values())
    bins = [name for name in files if name.endswith(".bin")]
    assert [cache_files(home)[name].read_bytes() for name in bins] == [files[n] for n in bins]
    before = stamps(home)
    assert build_sources(config(home, verify=True)) == expected
    assert stamps(home) == before
    assert build_sources(config(home, force_rebuild=True, write_cache=False)) == expected
    assert stamps(home) == before


def peak_of(work):
    """Return the most memory that Python held while it worked."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_text_larger_than_memory_is_built_and_served(home, monkeypatch):
    monkeypatch.setattr(mapped, "MAPPED_FROM", 1 << 20)
    (home / "wiki/train.txt").write_bytes("größer\n".encode() * 4_000_000)
    cfg = wiki_only(home, wiki_root=home / "wiki")
    for how in (
        cfg,
        cfg,
        replace(cfg, verify=True),
        replace(cfg, cache_dir="x", write_cache=False),
    ):
        assert peak_of(lambda how=how: build_sources(how)) < 10_000_000


def test_wikitext_is_not_joined_in_memory(home, monkeypatch):
    monkeypatch.setattr(mapped, "MAPPED_FROM", 1 << 20)
    lines = {"train": ["a line of text " * 40] * 50_000, "val": ["x" * 99]}
    monkeypatch.setattr(streams, "load_wikitext", lambda: lines)
    assert peak_of(lambda: build_sources(wiki_only(home))) < 10_000_000
    train, _ = build_sources(wiki_only(home))
    assert train["wiki"] == build_wiki_stream(lines["train"], sep="\n\n")


def test_a_reader_between_the_two_files_of_a_writer_sees_no_damage(home, monkeypatch):
    """The new bytes are in place, but their meta file is not yet; the reader wants the old ones."""
    wanted = config(home, roam_val_frac=0.2, write_cache=False)
    expected = build_sources(replace(wanted, write_cache=True))
    write = cache.write_durably
    seen = []

    def write_and_read(targets, data):
        write(targets, data)
        seen.append(build_sources(wanted))

    monkeypatch.setattr(cache, "write_durably", write_and_read)
    build_sources(config(home, roam_val_frac=0.4))
    assert seen == [expected] * 4
    assert [train.messages for train, _ in seen] == [[]] * 4


def test_a_writer_that_overtakes_a_reader_is_no_damage(home, monkeypatch):
    """The reader has the old meta file, and then finds the new bytes."""
    wanted = config(home, roam_val_frac=0.2)
    expected = build_sources(wanted)
    old = {path: path.read_bytes() for path in cache_files(home).values()}
    build_sources(config(home, roam_val_frac=0.4))
    new = {path: path.read_bytes() for path in cache_files(home).values()}
    read_meta = cache.read_meta
    for split in ("train", "val"):
        for path, data in old.items():
            path.write_bytes(data)

        def overtaken(folder, name, split=split):
            meta = read_meta(folder, name)
            if name == f"roam_{split}":
                for path, data in new.items():
                    path.write_bytes(data)
            return meta

        monkeypatch.setattr(cache, "read_meta", overtaken)
        train, val = build_sources(replace(wanted, write_cache=False))
        assert (train, val) == expected
        assert train.messages == []


# --- what is missing or wrong ------------------------------------------------------------------


def test_required_sources_have_to_be_enabled(home):
    with pytest.raises(ValueError, match=r"subset of enabled_sources.*\['roam'\]"):
        build_sources(config(home, enabled_sources=("wiki", "primer")))


def test_unknown_sources_are_named(home):
    with pytest.raises(ValueError, match=r"unknown sources \['books'\]; known: \['wiki', 'r"):
        build_sources(config(home, enabled_sources=(*NAMES, "books")))


def keep_one_note(home):
    for path in (home / "notes").rglob("*.md"):
        if path.name != "7.md":
            path.unlink()


def folder_for_val(home):
    (home / "wiki/val.txt").unlink()
    (home / "wiki/val.txt").mkdir()


LOSSES = {
    "no notes": ("roam", lambda h: shutil.rmtree(h / "notes"), "no notes"),
    "one note": ("roam", keep_one_note, "validation"),
    "no primer": ("primer", lambda h: (h / "primer.txt").unlink(), "no primer file"),
    "empty primer": ("primer", lambda h: (h / "primer.txt").write_text(" \n"), "no text"),
    "one dialogue": ("primer", lambda h: (h / "primer.txt").write_text("a" * 99), "validation"),
    "empty wiki": ("wiki", lambda h: (h / "wiki/train.txt").write_text(""), "no text"),
    "empty wiki val": ("wiki", lambda h: (h / "wiki/val.txt").write_text(""), "validation"),
    "a folder for a file": ("wiki", folder_for_val, "must have"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_required_source_that_cannot_be_built_is_named_with_the_reason(home, loss):
    source, act, why = LOSSES[loss]
    act(home)
    with pytest.raises(RuntimeError, match=f"{source!r} cannot be built: .*{why}"):
        build_sources(config(home))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_missing_source_that_is_allowed_is_left_out_with_the_reason(home, loss):
    source, act, why = LOSSES[loss]
    act(home)
    train, val = build_sources(config(home, allow_missing_sources=True))
    assert train.keys() == val.keys() == set(NAMES) - {source}
    assert train.missing == val.missing
    assert train.missing.keys() == {source}
    assert why in train.missing[source]


def test_a_file_that_cannot_be_read_is_a_reason_too(home, monkeypatch):
    def refuse(path):
        if path.name == "primer.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(RuntimeError, match=r"'primer' cannot .*denied: '.*primer\.txt'"):
        build_sources(config(home))
    assert "denied" in build_sources(config(home, allow_missing_sources=True))[0].missing["primer"]


def test_a_source_that_is_not_required_may_have_no_validation_text(home):
    (home / "primer.txt").write_text("user: a\n" * 9)
    train, val = build_sources(config(home, required_sources=("wiki",)))
    assert "primer" in train
    assert "primer" not in val
    assert "primer: its validation split has 0 bytes" in train.messages[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"T": 42}, r"'wiki', split 'val': 42 bytes, too short for T=42"),
        ({"T": 1000}, r"'wiki', split 'train': \d+ bytes, too short for T=1000"),
        ({"T": 60, "enabled_sources": ("primer",)}, r"'primer', split 'val': \d+ bytes, too short"),
        ({"T": 9000, "enabled_sources": ("roam",)}, r"'roam', split 'train': \d+ bytes, too short"),
    ],
)
def test_streams_shorter_than_one_window_are_named(home, options, message):
    required = options.get("enabled_sources", NAMES)
    with pytest.raises(ValueError, match=message):
        build_sources(config(home, required_sources=required, **options))


def test_a_stream_of_exactly_one_window_is_enough(home):
    sources = build_sources(wiki_only(home, wiki_root=home / "wiki", T=41))
    assert len(sources[1]["wiki"]) == 42


# --- what the user names -----------------------------------------------------------------------

NO_TEXT = {
    "no notes": ("roam", lambda h: shutil.rmtree(h / "notes") or (h / "notes").mkdir(), "no notes"),
    "blank primer": ("primer", lambda h: (h / "primer.txt").write_text(" \n"), "no text"),
    "empty wiki": ("wiki", lambda h: (h / "wiki/train.txt").write_text(""), "no text"),
    "half a wiki": ("wiki", lambda h: (h / "wiki/val.txt").unlink(), "must have train.txt and"),
}


@pytest.mark.parametrize("p_train", [{"wiki": 1.0}, {"wiki": 0.5, "roam": 0.3, "primer": 0.2}])
@pytest.mark.parametrize("loss", NO_TEXT)
def test_a_source_that_is_named_has_to_have_text_whatever_its_share(home, loss, p_train):
    source, act, why = NO_TEXT[loss]
    places = {"roam": home / "notes", "primer": home / "primer.txt", "wiki": home / "wiki"}
    train_cfg = TrainConfig(p_train=p_train)
    train, val = build_train_val_sources(
        MODEL, train_cfg, build_cfg=StreamBuildConfig(places=places)
    )
    assert train.keys() == p_train.keys()
    assert val.keys() == p_train.keys()
    act(home)
    for only in (places, {source: places[source], "wiki": places["wiki"]}):
        with pytest.raises(RuntimeError, match=f"{source!r} cannot be built: .*{why}"):
            build_train_val_sources(MODEL, train_cfg, build_cfg=StreamBuildConfig(places=only))


def test_a_default_source_too_short_for_a_window_is_left_out_and_a_named_one_refused(home):
    (home / "primer.txt").write_text(f"user: a{DIALOGUE_DELIM}user: b")
    cfg = config(home, required_sources=("wiki",))
    train, val = build_sources(cfg)
    assert train.keys() == val.keys() == {"wiki", "roam"}
    assert train.missing == {"primer": "split 'train': 7 bytes, too short for T=8 (needs T+1=9)"}
    with pytest.raises(ValueError, match="'primer', split 'train': 7 bytes, too short for T=8"):
        build_sources(replace(cfg, places={"primer": home / "primer.txt"}))
    with pytest.raises(ValueError, match="'primer', split 'train': 7 bytes, too short for T=8"):
        build_sources(replace(cfg, required_sources=("primer",)))


def test_no_place_at_all_is_not_the_current_folder(home, monkeypatch):
    monkeypatch.chdir(home)
    cfg = config(home, required_sources=("wiki",), roam_root="", primer_path="")
    assert build_sources(cfg)[0].missing == {
        "roam": "no folder of notes was given",
        "primer": "no primer file was given",
    }


# --- for a run ---------------------------------------------------------------------------------

MODEL = ModelConfig(T=8)


def test_a_run_gets_its_sources_with_its_own_t_and_seed(home):
    train, val = build_train_val_sources(
        MODEL, TrainConfig(seed=7), build_cfg=config(home, T=10**6, seed=1)
    )
    assert (train, val) == build_sources(config(home, seed=7))
    assert train["roam"] != build_sources(config(home, seed=1))[0]["roam"]


def test_the_defaults_are_the_roots_own_folders(home, monkeypatch):
    monkeypatch.setattr(paths, "ROAM_DIR", home / "notes")
    monkeypatch.setattr(paths, "PRIMER_PATH", home / "primer.txt")
    train, val = build_train_val_sources(MODEL, TrainConfig())
    assert tuple(train) == tuple(val) == NAMES
    assert describe_sources(train)["wiki"].origin.startswith("Python")
    assert [message[:5] for message in train.messages] == ["wiki:"]


def test_a_run_goes_without_notes_and_says_so(home):
    cfg = config(home, roam_root=home / "none")
    train, _ = build_train_val_sources(MODEL, TrainConfig(), build_cfg=cfg)
    assert train.keys() == {"wiki", "primer"}
    why = f"no notes (*.md): {home / 'none'} does not exist"
    assert train.missing == {"roam": why}
    p = renormalise(TrainConfig().p_train, train)
    assert p == pytest.approx({"wiki": 0.784 / 0.804, "primer": 0.02 / 0.804})


@pytest.mark.parametrize(
    ("p", "names"),
    [
        ({"roam": 1.0}, {"roam"}),
        ({"roam": 0.5, "wiki": 0.5, "primer": 0.0}, {"roam", "wiki"}),
        ({"wiki": 1.0, "books": 0.0}, {"wiki"}),
    ],
)
def test_a_run_trains_on_what_p_train_names_and_is_evaluated_on_the_wiki(home, p, names):
    train, val = build_train_val_sources(MODEL, TrainConfig(p_train=p), build_cfg=config(home))
    assert train.keys() == names
    assert val["wiki"] == (home / "wiki/val.txt").read_bytes()
    assert describe_sources(train).keys() == names


def test_a_run_does_not_train_past_an_incomplete_wiki_folder(home):
    (home / "wiki/val.txt").unlink()
    with pytest.raises(RuntimeError, match=r"'wiki' cannot be built: the folder .*wiki must have"):
        build_train_val_sources(MODEL, TrainConfig(), build_cfg=config(home))


def test_the_validation_text_of_notes_may_be_short_but_not_that_of_the_wiki(home):
    cfg = config(home)
    train, val = build_train_val_sources(ModelConfig(T=41), TrainConfig(), build_cfg=cfg)
    assert train.keys() == set(NAMES)
    assert val.keys() == {"wiki", "roam"}
    with pytest.raises(ValueError, match="'wiki', split 'val': 42 bytes, too short for T=42"):
        build_train_val_sources(ModelConfig(T=42), TrainConfig(), build_cfg=cfg)


def test_a_replaced_build_sources_with_plain_dicts_serves_too(monkeypatch):
    seen = []
    given = ({"wiki": b"w" * 9, "roam": b"r" * 9}, {"wiki": b"v" * 9})
    monkeypatch.setattr(streams, "build_sources", lambda cfg=None: seen.append(cfg) or given)
    train, val = build_train_val_sources(MODEL, TrainConfig(p_train={"wiki": 1.0}))
    assert (train, val) == ({"wiki": b"w" * 9}, {"wiki": b"v" * 9})
    assert given[0].keys() == {"wiki", "roam"}
    assert seen[0].allow_missing_sources
    assert seen[0].wiki_fallback
    assert (seen[0].T, seen[0].seed) == (8, 42)
    info = describe_sources(train)["wiki"]
    assert (info.origin, info.place, info.nbytes) == ("given", "", 9)
    assert info.sha256 == hashlib.sha256(b"w" * 9).hexdigest()


def test_validation_text_of_the_wiki_is_a_must(monkeypatch):
    monkeypatch.setattr(streams, "build_sources", lambda cfg=None: ({"wiki": b"w" * 9}, {}))
    with pytest.raises(RuntimeError, match="'wiki' cannot be built: no validation text"):
        build_train_val_sources(MODEL, TrainConfig())


def test_what_was_built_is_described_without_hashing_it_again(home, monkeypatch):
    train, _ = build_sources(config(home))
    expected = {name: hashlib.sha256(stream).hexdigest() for name, stream in train.items()}
    monkeypatch.setattr(hashlib, "sha256", None)
    assert {name: info.sha256 for name, info in describe_sources(train).items()} == expected
    monkeypatch.undo()
    train["wiki"] = bytes(len(train["wiki"]))  # not what was built
    info = describe_sources(train)["wiki"]
    assert info.origin == "given"
    assert info.sha256 == hashlib.sha256(train["wiki"]).hexdigest()


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside this checkout")
def test_real_wiki_and_notes_come_through_whole(home):
    cfg = config(home, roam_root=SHARED / "notes", wiki_root=SHARED / "wiki")
    for _ in range(2):  # built, then cached
        train, val = build_train_val_sources(ModelConfig(T=8), TrainConfig(), build_cfg=cfg)
        assert train["wiki"] == (SHARED / "wiki/train.txt").read_bytes()
        assert len(train["roam"]) > 8 * len(val["roam"]) > 0
        assert train.messages == []
