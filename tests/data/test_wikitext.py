"""WikiText through a replaceable `load_dataset`: splits, names on the hub, the missing package."""

import subprocess
import sys
from collections.abc import ValuesView

import pytest

from niels_gpt.data import load_wikitext, wikitext
from tests import ROOT

ROWS = {
    "train": [{"text": " = A = \n"}, {"text": ""}, {"text": " \n"}, {"text": " b\n"}],
    "validation": [{"text": "v"}],
    "test": [{"text": "t"}, {"text": "\t"}],
}
LINES = {"train": [" = A = \n", " b\n"], "val": ["v"], "test": ["t"]}


def columns() -> dict[str, dict[str, list[str]]]:
    """Give the rows as the hub's own tables do: a column per name."""
    return {split: {"text": [row["text"] for row in rows]} for split, rows in ROWS.items()}


def rows_without_an_index() -> dict[str, ValuesView[dict[str, str]]]:
    """Rows that can only be iterated."""
    return {split: dict(enumerate(rows)).values() for split, rows in ROWS.items()}


@pytest.mark.parametrize("hub", [ROWS, columns(), rows_without_an_index()])
def test_the_splits_are_renamed_and_blank_lines_dropped(monkeypatch, hub):
    calls = []
    monkeypatch.setattr(wikitext, "load_dataset", lambda *a: calls.append(a) or hub)
    assert load_wikitext() == LINES
    assert calls == [("wikitext", "wikitext-103-raw-v1")]


def test_the_second_name_is_tried_where_the_hub_does_not_know_the_first(monkeypatch):
    def load_dataset(name, config):
        if name != "Salesforce/wikitext":
            raise ValueError(f"no such repository: {name}")
        assert config == "wikitext-103-raw-v1"
        return ROWS

    monkeypatch.setattr(wikitext, "load_dataset", load_dataset)
    assert load_wikitext() == LINES


def test_an_unreachable_hub_gives_both_reasons(monkeypatch):
    def load_dataset(name, config):
        raise ConnectionError(f"no route to {name}")

    monkeypatch.setattr(wikitext, "load_dataset", load_dataset)
    with pytest.raises(RuntimeError, match=r"no route to wikitext.*to Salesforce/wiki"):
        load_wikitext()


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load_wikitext()


def test_the_package_is_imported_only_when_called(monkeypatch, tmp_path):
    (tmp_path / "datasets.py").write_text(
        "def load_dataset(*a): return {s: {'text': [s]} for s in ('train','validation','test')}"
    )
    code = (
        "import sys; from niels_gpt.data import load_wikitext;"
        "print('datasets' in sys.modules, load_wikitext(), 'datasets' in sys.modules)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    splits = {"train": ["train"], "val": ["validation"], "test": ["test"]}
    assert run.stdout == f"False {splits} True\n"
