"""`niels-gpt data`: what is said of the text is what the training reads."""

from __future__ import annotations

import json
import os

import pytest

from niels_gpt import paths, streams
from niels_gpt.cli import main
from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.corpus import open_corpus
from niels_gpt.data import cache, wiki
from niels_gpt.data.sources import Given
from niels_gpt.files import mapped
from niels_gpt.files.mapped import open_bytes
from niels_gpt.step import batch_of_step
from niels_gpt.streams import StreamBuildConfig, build_sources, locate
from niels_gpt.tokenizer import decode

HUB = {
    split: [{"text": f"{split} line {n} of the hub\n"} for n in range(90)]
    for split in ("train", "validation", "test")
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty place for the cache, the notes and the wiki."""
    monkeypatch.setattr(paths, "REPO_ROOT", tmp_path / "root")
    monkeypatch.setattr(paths, "ROAM_DIR", tmp_path / "root" / ".roam-data")
    monkeypatch.setattr(streams, "load_wikitext", no_network)
    return tmp_path / "root"


def no_network():
    raise RuntimeError("no network")


@pytest.fixture
def where(root, texts):
    return "--wiki", texts / "wiki", "--roam", texts / "notes"


def info(niels, *args):
    result = niels("data", "info", "--json", *args)
    assert result.exit_code == 0, result.stderr
    return {source["name"]: source for source in json.loads(result.stdout)}


# --- info --------------------------------------------------------------------------------------


def test_info_tells_what_a_training_reads(niels, where, texts):
    found = info(niels, *where)
    cfg = StreamBuildConfig(wiki_root=texts / "wiki", roam_root=texts / "notes")
    for split, sources in zip(("train", "val"), build_sources(cfg), strict=True):
        assert list(sources) == list(found)
        for name, known in streams.describe_sources(sources).items():
            said = found[name]["splits"][split]
            assert (said["nbytes"], said["sha256"]) == (known.nbytes, known.sha256)
    assert [found[name]["files"] for name in found] == [2, 12, 1]
    assert [found["roam"]["splits"][s]["documents"] for s in ("train", "val")] == [11, 1]
    assert found["roam"]["origin"] == "notes"
    assert not any(source["left_out"] for source in found.values())


def test_info_follows_the_cache_and_writes_nothing(niels, where, root, texts, tmp_path):
    def states():
        return {
            s["cache"] for source in info(niels, *where).values() for s in source["splits"].values()
        }

    assert states() == {"not cached"}
    assert not root.exists()
    assert niels("data", "build", *where).exit_code == 0
    assert states() == {"cached"}
    other = tmp_path / "notes"
    other.mkdir()
    for n in range(3):
        (other / f"{n}.md").write_text("another note\n" * 90)
    found = info(niels, "--wiki", texts / "wiki", "--roam", other)
    assert found["roam"]["splits"]["train"]["cache"] == "the cache will be rebuilt"
    assert found["wiki"]["splits"]["train"]["cache"] == "cached"


def test_the_split_is_that_of_the_configs_seed(niels, where, tmp_path):
    (tmp_path / "c.json").write_text('{"train": {"seed": 7}}')
    default, other = info(niels, *where), info(niels, *where, "--config", "c.json")
    assert default["roam"]["splits"]["val"] != other["roam"]["splits"]["val"]
    assert default["wiki"] == other["wiki"]


def test_what_is_left_out_of_a_text_is_listed_whole(niels, where, root, tmp_path):
    novels = tmp_path / "novels"
    novels.mkdir()
    for name in "abc":
        (novels / f"{name}.txt").write_text("text\n" * 100)
        (novels / f"{name}.lnk").symlink_to(novels)
        (novels / f"{name}.bin").write_bytes(bytes(500))
    found = info(niels, *where[:2], "--text", novels)["text"]
    assert {os.path.basename(f["path"]) for f in found["left_out"]} == {
        f"{name}.{end}" for name in "abc" for end in ("lnk", "bin")
    }
    assert found["files"] == 3


def test_what_is_left_out_is_listed_with_its_reason(niels, where, root, tmp_path):
    notes = tmp_path / "vault"
    hidden = (".obsidian/a.md", ".trash/b.md", "pages/.d.md", "pages/.away.md.icloud")
    for path in (*hidden, "logseq/bak/c.md", "pages/e.md"):
        (notes / path).parent.mkdir(parents=True, exist_ok=True)
        (notes / path).write_text("text\n" * 100)
    (notes / "loop").symlink_to(notes)
    (notes / "gone.md").symlink_to(notes / "nowhere")
    os.mkfifo(notes / "pipe.md")
    (notes / "latin.md").write_bytes("déjà vu\n".encode("latin-1") * 90)
    (notes / "wide.md").write_text("wide\n" * 90, encoding="utf-16")
    found = info(niels, *where[:2], "--roam", notes)["roam"]
    assert {os.path.relpath(f["path"], notes): f["reason"] for f in found["left_out"]} == {
        ".obsidian": "hidden",
        ".trash": "hidden",
        "logseq/bak": "Logseq's backups",
        "pages/.d.md": "hidden",
        "pages/away.md": "only in iCloud; download it to train on it",
        "loop": "link to a folder",
        "gone.md": "No such file or directory",
        "pipe.md": "not a regular file",
    }
    assert {os.path.relpath(f["path"], notes): f["reason"] for f in found["altered"]} == {
        "latin.md": "not UTF-8: 180 characters were replaced",
        "wide.md": "UTF-16-LE, converted to UTF-8",
    }
    assert found["files"] == 3
    lines = niels("data", "info", *where[:2], "--roam", notes).stdout.splitlines()
    assert f"  left out: {notes / 'loop'}: link to a folder" in lines
    assert f"  altered: {notes / 'wide.md'}: UTF-16-LE, converted to UTF-8" in lines


def test_a_long_list_is_cut_and_says_so(niels, where, tmp_path):
    notes = tmp_path / "vault"
    notes.mkdir()
    (notes / "a.md").write_text("text\n" * 100)
    for n in range(25):
        (notes / f".{n:02}.md").write_text("hidden")
    lines = niels("data", "info", *where[:2], "--roam", notes).stdout.splitlines()
    assert sum("left out" in line for line in lines) == 21
    assert "  left out: and 5 more (--json lists them all)" in lines


def test_info_goes_on_where_a_source_cannot_be_used(niels, root, texts, tmp_path):
    (root / "data/wiki").mkdir(parents=True)
    found = info(niels, "--roam", texts / "notes")
    assert "must have train.txt" in found["wiki"]["problem"]
    assert found["roam"]["problem"] is None
    text = niels("data", "info").stdout
    assert "wiki    not available: " in text
    assert f"roam    not available: no notes (*.md): {paths.ROAM_DIR} does not exist" in text


@pytest.mark.parametrize("with_note", [True, False])
def test_text_of_another_suffix_is_not_passed_over_in_silence(niels, where, tmp_path, with_note):
    notes = tmp_path / "vault"
    (notes / ".obsidian").mkdir(parents=True)
    for name in ("a.org", "b.org", "picture.png", ".DS_Store", ".obsidian/app.json"):
        (notes / name).write_text("text")
    if with_note:
        (notes / "c.md").write_text("text\n" * 100)
    lines = niels("data", "info", *where[:2], "--roam", notes).stdout.splitlines()
    notes = "notes are *.md and *.markdown"
    assert f"  note: roam: 1 other file is not read (1 .png): {notes}" in lines
    texts = [line for line in lines if f"2 text files are not read (2 .org): {notes}" in line]
    assert len(texts) == 1


def test_info_fetches_nothing(niels, root, monkeypatch):
    def fetch():
        raise AssertionError("info has to work without the network")

    monkeypatch.setattr(streams, "load_wikitext", fetch)
    monkeypatch.setattr(
        wiki, "load_python_docs", lambda: {"train": ["text " * 100], "val": ["text " * 100]}
    )
    found = info(niels)
    assert found["wiki"]["origin"].endswith("documentation")
    assert "niels-gpt data fetch" in found["wiki"]["messages"][0]


# --- build and fetch ---------------------------------------------------------------------------


def test_build_caches_what_a_training_takes(niels, where, root, texts):
    result = niels("data", "build", *where)
    assert result.exit_code == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        f"{split}/{name}" for split in ("train", "val") for name in ("wiki", "roam", "primer")
    ]
    cached = {p.name: p.read_bytes() for p in (root / "data" / "cache" / "streams").glob("*.bin")}
    train, val = build_sources(
        StreamBuildConfig(wiki_root=texts / "wiki", roam_root=texts / "notes")
    )
    assert cached == {
        f"{name}_{split}.bin": stream
        for split, sources in (("train", train), ("val", val))
        for name, stream in sources.items()
    }


def test_build_has_whole_digests_as_json(niels, where, texts):
    found = json.loads(niels("data", "build", "--json", *where).stdout)
    cfg = StreamBuildConfig(wiki_root=texts / "wiki", roam_root=texts / "notes")
    known = [streams.describe_sources(sources) for sources in build_sources(cfg)]
    assert found == {
        split: {name: info._asdict() for name, info in infos.items()}
        for split, infos in zip(("train", "val"), known, strict=True)
    }


def test_build_needs_what_is_named_only(niels, root, texts, tmp_path):
    result = niels("data", "build", "--wiki", texts / "wiki")
    assert result.exit_code == 0
    assert "note: roam: left out (no notes" in result.stderr
    named = niels("data", "build", "--wiki", texts / "wiki", "--roam", tmp_path / "absent")
    assert (named.exit_code, named.stdout) == (2, "")
    assert f"--notes {tmp_path / 'absent'}: no such folder" in named.stderr
    (tmp_path / "absent").mkdir()
    named = niels("data", "build", "--wiki", texts / "wiki", "--roam", tmp_path / "absent")
    assert (named.exit_code, named.stdout) == (2, "")
    assert "source 'roam' cannot be built" in named.stderr


def test_rebuild_builds_anew(niels, where, root):
    niels("data", "build", *where)
    path = root / "data" / "cache" / "streams" / "wiki_train.bin"
    before = path.stat().st_ino
    niels("data", "build", *where)
    assert path.stat().st_ino == before
    niels("data", "build", "--rebuild", *where)
    assert path.stat().st_ino != before


def test_verify_finds_a_bit_that_the_disk_lost(niels, where, root, monkeypatch):
    monkeypatch.setattr(mapped, "MAPPED_FROM", 1)
    first = niels("data", "build", *where)
    path = root / "data" / "cache" / "streams" / "wiki_train.bin"
    whole = path.read_bytes()
    path.write_bytes(b"?" + whole[1:])
    meta = cache.read_meta(path.parent, path.stem)
    lost = cache.Stream(open_bytes(path), meta["sha256"])
    path.with_name("wiki_train.meta.json").write_text(json.dumps(meta | {"seal": cache.seal(lost)}))
    assert niels("data", "build", *where).stdout == first.stdout
    found = niels("data", "build", "--verify", *where)
    assert "wiki_train.bin does not match the length and digest" in found.stderr
    assert "rebuilding it" in found.stderr
    assert found.stdout == first.stdout
    assert path.read_bytes() == whole
    assert niels("data", "build", "--verify", *where).stderr == ""
    assert niels("data", "build", "--verify", "--rebuild", *where).exit_code == 2


def test_what_is_fetched_once_needs_no_network_again(niels, root, monkeypatch):
    from niels_gpt.data import wikitext

    calls = []

    def load_dataset(*args):
        calls.append(args)
        if len(calls) == 1:
            raise ConnectionError("the network went away")
        return HUB

    monkeypatch.setattr(streams, "load_wikitext", wikitext.load_wikitext)
    monkeypatch.setattr(wikitext, "_HUB_NAMES", ("Salesforce/wikitext",) * 2)
    monkeypatch.setattr(wikitext, "load_dataset", load_dataset)
    (root / "data" / "wiki").mkdir(parents=True)  # a folder of the user's does not stand in for it
    first = niels("data", "fetch")
    assert first.exit_code == 0, first.stderr
    assert "train/wiki    WikiText-103, " in first.stdout
    fetched = len(calls)
    second = niels("data", "fetch")
    assert second.stdout == first.stdout
    assert len(calls) == fetched


def test_a_fetch_that_fails_says_what_to_do(niels, root, monkeypatch):
    result = niels("data", "fetch")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: WikiText-103 is not available: no network\n"


# --- sample ------------------------------------------------------------------------------------


def test_samples_are_the_rows_of_the_training(niels, where, texts, tmp_path):
    (tmp_path / "c.json").write_text('{"model": {"T": 20, "C": 8, "H": 2}, "train": {"B": 6}}')
    args = ["--config", "c.json", *where, "--step", "4", "-n", "5"]
    rows = json.loads(niels("data", "sample", *args, "--json").stdout)
    model_cfg, train_cfg = ModelConfig(T=20, C=8, H=2), TrainConfig(B=6)
    where = locate(Given({"wiki": texts / "wiki", "roam": texts / "notes"}))
    corpus = open_corpus(model_cfg, train_cfg, where)
    x, y = batch_of_step(train_cfg.seed, 3, corpus.train, p=corpus.p, B=6, T=20)
    assert len(rows) == 5
    for row in rows:
        ids = [*x[row["row"]].tolist(), int(y[row["row"], -1])]
        assert row["text"] == decode(x.new_tensor(ids))
        start = row["start"]
        assert corpus.train[row["source"]][start : start + 21] == bytes(ids)
    shown = niels("data", "sample", *args).stdout
    assert all(
        f"row {row['row']}: {row['source']} from byte {row['start']:,}" in shown for row in rows
    )


@pytest.mark.parametrize("command", ["info", "build", "sample"])
def test_a_bad_config_is_told(niels, root, command):
    result = niels("data", command, "--config", "absent")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "absent: no such config file" in result.stderr


def test_every_command_has_a_help_with_an_example():
    """For this group and all others, subcommands included."""
    from click.testing import CliRunner

    for name in main.list_commands(None):
        command = main.get_command(None, name)
        for words, one in (
            [([name], command)]
            if not hasattr(command, "commands")
            else [([name, sub], c) for sub, c in command.commands.items()]
        ):
            text = CliRunner().invoke(main, [*words, "--help"]).output
            assert "Example: " in text, words
            assert one.short_help or one.help, words
