"""The table of sources: an entry and a reader make a source that everything else knows."""

import pytest

from niels_gpt import paths
from niels_gpt.config import SOURCE_NAMES
from niels_gpt.data.recipe import Recipe, Unavailable
from niels_gpt.data.sources import SOURCES, Given, Source, option_of
from niels_gpt.streams import StreamBuildConfig, build_sources, describe_sources, locate


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "REPO_ROOT", tmp_path)
    return tmp_path


def test_the_names_of_a_config_are_those_of_the_table():
    assert tuple(SOURCES) == SOURCE_NAMES


def test_every_command_that_reads_text_has_an_option_for_each_source(niels):
    for command in (["train"], ["evaluate"], ["sweep"], ["data", "info"]):
        said = niels(*command, "--help").output
        for name, source in SOURCES.items():
            assert f"--{name} {source.metavar}" in said
            assert option_of(name) in said
            assert source.help in said


def a_book(how):
    def build():
        text = how.place.read_bytes()
        return text[:-20], text[-20:]

    if not how.place:
        raise Unavailable("no book was given")
    return [Recipe("book", str(how.place), {"seed": how.seed}, build)]


def books(root, **changes):
    cfg = {"T": 8, "enabled_sources": ("book",), "required_sources": ("book",), **changes}
    return build_sources(StreamBuildConfig(cache_dir=root / "cache", **cfg))


def test_an_entry_in_the_table_is_all_that_streams_need(root, monkeypatch):
    monkeypatch.setitem(SOURCES, "book", Source("FILE", "A book.", a_book, must_be="file"))
    (root / "book.txt").write_text("Call me Ishmael. " * 9)
    found = locate(Given({"book": root / "book.txt"}))
    assert "book" in found.enabled_sources
    assert "book" not in locate(Given({})).enabled_sources
    train, val = books(root, places=found.places)
    assert train["book"] + val["book"] == (root / "book.txt").read_bytes()
    assert describe_sources(train)["book"].origin == "book"
    assert (root / "cache/book_train.bin").exists()
    with pytest.raises(RuntimeError, match="'book' cannot be built: no book was given"):
        books(root)
    with pytest.raises(FileNotFoundError, match=r"--book .*gone\.txt: no such file"):
        locate(Given({"book": root / "gone.txt"}))


def recipe(origin, error="", **more):
    def build():
        if error:
            raise Unavailable(error)
        return origin.encode() * 9, origin.encode() * 9

    return Recipe(origin, "", {}, build, **more)


@pytest.mark.parametrize(
    ("candidates", "origin", "messages"),
    [
        ([recipe("first"), recipe("second")], "first", []),
        (
            [recipe("first", "no network", remedy="give --book DIR"), recipe("second")],
            "second",
            [
                "book: using the fallback text, second. "
                "For other text, give --book DIR, or make first available: no network"
            ],
        ),
        ([recipe("only", messages=["2 left out"])], "only", ["book: 2 left out"]),
    ],
    ids=["first", "fallback", "message"],
)
def test_the_first_recipe_that_is_available_serves(root, monkeypatch, candidates, origin, messages):
    monkeypatch.setitem(SOURCES, "book", Source("DIR", "A book.", lambda how: candidates))
    train, _ = books(root, T=4)
    assert describe_sources(train)["book"].origin == origin
    assert train.messages == messages


def test_where_no_recipe_is_available_the_first_one_says_why(root, monkeypatch):
    candidates = [recipe("first", "no network", remedy="give --book DIR"), recipe("second", "no")]
    monkeypatch.setitem(SOURCES, "book", Source("DIR", "A book.", lambda how: candidates))
    with pytest.raises(RuntimeError, match=r"no network\. Alternatively, give --book DIR"):
        books(root)
