"""Folders of notes as users have them, and a stable split."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.data import list_roam_paths, load_texts, scan_notes, split_roam_paths
from tests import SHARED

NOTES = SHARED / "notes"


def write(root: Path, name: str, text: str = "note") -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_notes_are_found_at_any_depth_sorted_and_absolute(tmp_path, monkeypatch):
    deep = "/".join("12345678") + "/deep.md"
    names = [
        "b.md",
        "a/z.md",
        "📚 books/ü.md",
        "a b/c.md",
        "upper.MD",
        "long.markdown",
        "L.MarkDown",
    ]
    names.append(deep)
    for name in [*names, "a/readme.txt", "md", "a/markdown", "a.md.txt"]:
        write(tmp_path / "vault", name)
    (tmp_path / "vault/folder.md").mkdir()
    expected = sorted(str(tmp_path / "vault" / name) for name in names)
    assert list_roam_paths(tmp_path / "vault") == expected
    monkeypatch.chdir(tmp_path)
    assert list_roam_paths("vault") == expected


def test_what_is_left_out_is_listed_with_its_reason(tmp_path):
    root = tmp_path / "vault"
    kept = [write(root, "logseq/config.md"), write(root, "x/bak/fine.md"), write(root, "note.md")]
    for name in [".obsidian/x.md", "a/.trash/x.md", "logseq/bak/x.md", "._note.md"]:
        write(root, name)
    write(root, "logseq/version-files/base/x.md")
    write(tmp_path, "elsewhere/linked.md")
    (root / "loop").symlink_to(root)
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (root / "gone.md").symlink_to(tmp_path / "nowhere.md")
    (root / "alias.md").symlink_to(tmp_path / "elsewhere/linked.md")
    os.mkfifo(root / "pipe.md")

    paths, skipped = scan_notes(root)
    assert paths == sorted([*kept, root / "alias.md"])
    assert {str(s.path.relative_to(root)): s.reason for s in skipped} == {
        ".obsidian": "hidden",
        "a/.trash": "hidden",
        "._note.md": "hidden",
        "logseq/bak": "Logseq's backups",
        "logseq/version-files": "Logseq's backups",
        "loop": "link to a folder",
        "out": "link to a folder",
        "gone.md": "No such file or directory",
        "pipe.md": "not a regular file",
    }
    assert skipped == sorted(skipped)


def test_a_note_with_several_names_counts_once(tmp_path):
    root = tmp_path / "vault"
    for name in ("a.md", "z.md", "b/linked.md", "q.md"):
        write(root, name, name)
    write(tmp_path, "elsewhere.md")
    (root / "0 link.md").symlink_to(root / "b/linked.md")
    (root / "1 link.md").symlink_to("0 link.md")
    (root / "out.md").symlink_to(tmp_path / "elsewhere.md")
    (root / "out again.md").symlink_to(tmp_path / "elsewhere.md")
    (root / "zz.md").hardlink_to(root / "z.md")
    paths, skipped = scan_notes(root)
    assert [str(p.relative_to(root)) for p in paths] == [
        *("a.md", "b/linked.md", "out again.md", "q.md", "z.md")
    ]
    assert {s.path.name: s.reason for s in skipped} == {
        "0 link.md": f"the same file as {root / 'b/linked.md'}",
        "1 link.md": f"the same file as {root / 'b/linked.md'}",
        "out.md": f"the same file as {root / 'out again.md'}",
        "zz.md": f"the same file as {root / 'z.md'}",
    }


def test_files_without_inodes_are_not_taken_for_one(tmp_path, monkeypatch):
    """Some network folders give every file the same number."""
    for name in ("a.md", "b.md"):
        write(tmp_path, name, name)
    status = (tmp_path / "a.md").stat()
    monkeypatch.setattr(Path, "stat", lambda path, **more: status)
    assert len(list_roam_paths(tmp_path)) == 2


def test_a_path_that_is_too_long_costs_only_the_notes_behind_it(tmp_path):
    write(tmp_path, "a.md")
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(20):
            os.mkdir("d" * 250, dir_fd=here)
            inner = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inner
            os.close(os.open("deep.md", os.O_CREAT | os.O_WRONLY, dir_fd=here))
            os.mkdir(".hidden", dir_fd=here)
        paths, skipped = scan_notes(tmp_path)
    finally:
        os.close(here)
    assert tmp_path / "a.md" in paths
    assert {s.reason for s in skipped} == {"hidden", "File name too long"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_notes_without_permission_are_left_out(tmp_path):
    write(tmp_path, "open.md")
    write(tmp_path, "closed.md").chmod(0)
    write(tmp_path, "room/inner.md").parent.chmod(0)
    paths, skipped = scan_notes(tmp_path)
    (tmp_path / "room").chmod(0o700)
    assert paths == [tmp_path / "open.md"]
    assert [s.path.name for s in skipped] == ["closed.md", "room"]


def test_the_root_itself_may_be_hidden_or_a_link(tmp_path):
    write(tmp_path, ".roam-data/logseq/bak/vault/a.md")
    (tmp_path / "link").symlink_to(tmp_path / ".roam-data/logseq/bak/vault")
    for root in (tmp_path / ".roam-data/logseq/bak/vault", tmp_path / "link"):
        assert list_roam_paths(root) == [str(root / "a.md")]


def test_a_missing_root_is_one_skipped_folder(tmp_path):
    paths, skipped = scan_notes(tmp_path / "none")
    assert paths == []
    assert [(s.path, s.reason) for s in skipped] == [
        (tmp_path / "none", "No such file or directory")
    ]


def test_texts_keep_their_line_ends_and_lose_only_bad_bytes(tmp_path):
    contents = [b"a\r\nb\rc\n", b"caf\xe9 \xc3\xa9", b""]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}.md").write_bytes(content)
    texts = load_texts(list_roam_paths(tmp_path))
    assert texts == ["a\r\nb\rc\n", "caf\ufffd é", ""]
    assert load_texts([str(tmp_path / "0.md")]) == texts[:1]


@pytest.mark.skipif(not NOTES.is_dir(), reason="no shared notes beside this checkout")
def test_a_real_vault_is_read_whole():
    paths = list_roam_paths(NOTES)
    assert len(paths) == sum(name.endswith(".md") for _, _, f in os.walk(NOTES) for name in f)
    assert any("\r\n" in text for text in load_texts(paths))
    train, val = split_roam_paths(paths, seed=42, root=NOTES)
    assert len(val) == len(paths) // 10
    assert sorted(train + val) == paths


# --- the split ---------------------------------------------------------------------------------

names = st.lists(st.text("abc/é", min_size=1, max_size=6).map(lambda s: f"{s}.md"), max_size=30)
fractions = st.floats(0, 0.99)
seeds = st.integers(0, 2**63 - 1)


def under(root: str, relative: list[str]) -> list[str]:
    return list(dict.fromkeys(os.path.normpath(f"{root}/{name}") for name in relative))


@given(names, fractions, seeds)
def test_the_split_is_a_partition_of_the_documented_size(names, val_frac, seed):
    paths = under("/vault", names)
    train, val = split_roam_paths(paths, val_frac=val_frac, seed=seed)
    n = len(paths)
    assert len(val) == (max(1, int(n * val_frac)) if n >= 2 else 0)
    assert sorted(train + val) == sorted(paths)
    assert [p for p in paths if p in train] == train
    assert [p for p in paths if p in val] == val


@given(names, fractions, seeds, st.randoms(use_true_random=False))
def test_neither_order_nor_place_nor_path_type_matters(names, val_frac, seed, random):
    paths = under("/vault", names)
    _, val = split_roam_paths(paths, val_frac=val_frac, seed=seed, root="/vault")
    moved = [p.replace("/vault", "/home/me/.notes", 1) for p in paths]
    random.shuffle(moved)
    _, moved_val = split_roam_paths(
        [*map(Path, moved), *map(Path, moved[:1])],
        val_frac=val_frac,
        seed=seed,
        root="/home/me/.notes",
    )
    assert {p.replace("/vault", "/home/me/.notes", 1) for p in val} == set(map(str, moved_val))


@given(names.filter(lambda n: len(n) >= 3), fractions, seeds, st.data())
def test_adding_or_renaming_one_note_moves_at_most_one_other(names, val_frac, seed, data):
    paths = under("/vault", names)
    if len(paths) < 2:
        return
    options = {"val_frac": val_frac, "seed": seed, "root": "/vault"}
    before = set(split_roam_paths(paths, **options)[1])
    added = set(split_roam_paths([*paths, "/vault/new.md"], **options)[1])
    assert len((before ^ added) - {"/vault/new.md"}) <= 1

    old = data.draw(st.sampled_from(paths))
    renamed = [p for p in paths if p != old] + ["/vault/new.md"]
    after = set(split_roam_paths(renamed, **options)[1])
    assert len((before ^ after) - {old, "/vault/new.md"}) <= 1


# --- the split by bytes --------------------------------------------------------------------------


def test_a_journal_beside_a_list_is_what_is_trained_on(tmp_path):
    journal = write(tmp_path, "journal.md", "j" * 96_000)
    shopping = write(tmp_path, "list.md", "l" * 200)
    for seed in range(20):
        assert split_roam_paths([journal, shopping], seed=seed) == ([journal], [shopping])


sizes_of_notes = st.lists(st.integers(0, 10**6), min_size=2, max_size=40)


@given(sizes_of_notes, st.floats(0.01, 0.9), seeds)
def test_no_note_above_twice_the_share_is_in_val_while_enough_are_below(sizes, val_frac, seed):
    table = {f"/vault/{i}.md": size for i, size in enumerate(sizes)}
    train, val = split_roam_paths(list(table), val_frac=val_frac, seed=seed, sizes=table)
    assert len(val) == max(1, int(len(table) * val_frac))
    assert sorted(train + val) == sorted(table)
    limit = 2 * val_frac * sum(sizes)
    if sum(size <= limit for size in sizes) >= len(val):
        assert all(table[path] <= limit for path in val)


@given(names, fractions, seeds, st.integers(1, 10**6), st.data())
def test_notes_of_like_size_are_split_by_rank_alone(names, val_frac, seed, size, data):
    paths = under("/vault", names)
    near = {path: data.draw(st.integers(size, 2 * size - 1)) for path in paths} if val_frac else {}
    like = dict.fromkeys(paths, size)
    by_rank = split_roam_paths(paths, val_frac=val_frac, seed=seed)
    assert split_roam_paths(paths, val_frac=val_frac, seed=seed, sizes=like) == by_rank
    if val_frac >= 0.5 or len(paths) * val_frac < 1:
        return
    if near and max(near.values()) <= 2 * val_frac * sum(near.values()):
        assert split_roam_paths(paths, val_frac=val_frac, seed=seed, sizes=near) == by_rank


@given(sizes_of_notes.filter(lambda sizes: len(sizes) >= 12), seeds, st.integers(0, 10**6))
def test_a_new_note_moves_few_others_whatever_their_sizes(sizes, seed, new):
    table = {f"/vault/{i}.md": size for i, size in enumerate(sizes)}
    more = {**table, "/vault/new.md": new}
    options = {"seed": seed, "root": "/vault"}
    before = set(split_roam_paths(list(table), sizes=table, **options)[1])
    after = set(split_roam_paths(list(more), sizes=more, **options)[1])
    large = [path for path, size in table.items() if size > 0.2 * sum(sizes)]
    still = [path for path, size in table.items() if size > 0.2 * sum(more.values())]
    assert len((before ^ after) - {"/vault/new.md"}) <= 2 + 2 * len(set(large) ^ set(still))


def test_the_default_root_is_the_common_parent():
    paths = [f"/home/me/vault/{name}.md" for name in "abcdefghij"]
    moved = [f"/elsewhere/{name}.md" for name in "abcdefghij"]
    _, val = split_roam_paths(paths, val_frac=0.4, seed=3)
    _, moved_val = split_roam_paths(moved, val_frac=0.4, seed=3)
    assert [Path(p).name for p in val] == [Path(p).name for p in moved_val]
    assert val == split_roam_paths(paths, val_frac=0.4, seed=3, root="/home/me/vault")[1]


def test_the_seed_and_the_fixed_hash_decide_the_split():
    paths = [f"/vault/{i}.md" for i in range(10)]
    chosen = [split_roam_paths(paths, val_frac=0.3, seed=seed)[1] for seed in range(8)]
    assert len({tuple(val) for val in chosen}) > 4
    assert chosen[0] == ["/vault/2.md", "/vault/3.md", "/vault/5.md"]


def test_a_fraction_outside_its_range_is_refused():
    for val_frac in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="val_frac"):
            split_roam_paths(["/a.md", "/b.md"], val_frac=val_frac, seed=0)
