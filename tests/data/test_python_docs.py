"""The fallback text: read from files, the same each time, and English."""

import subprocess
import sys

import pytest

from niels_gpt.data.python_docs import load_python_docs, python_docs_origin
from tests import ROOT

MODULE = '''
"""What the module
    is for."""
raise SystemExit("this file must not run")
class A:
    """A class.

    Dedented
        indented
    """
    async def f(self):
        "A coroutine."
        def inner():
            """An inner function."""
    x = """not a docstring"""
def undocumented(): pass
'''


@pytest.fixture
def stdlib(tmp_path):
    """Write a small standard library with everything that may be in one."""
    files = {
        "mod.py": MODULE.encode(),
        "pkg/__init__.py": b'"""A package."""',
        "pkg/silent.py": b"x = 1",
        "pkg/latin.py": b'# -*- coding: latin-1 -*-\n"""Caf\xe9 \\d."""',
        "pkg/broken.py": b'"""A syntax error.""" +',
        "pkg/nul.py": b'"""A NUL."""\0',
        "test/test_mod.py": b'"""A test."""',
        "pkg/tests/x.py": b'"""A test."""',
        "site-packages/x.py": b'"""Not the library."""',
        "pydoc_data/topics.py": b"topics = {'for': 'The for statement\\n', 'if': 'If.'}",
        "data.txt": b"not Python",
    }
    for name, content in files.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "lib"


def test_documents_are_topics_and_the_docstrings_of_modules(stdlib):
    docs = load_python_docs(stdlib)
    assert docs.keys() == {"train", "val"}
    assert len(docs["val"]) == 1
    assert sorted(docs["train"] + docs["val"]) == sorted(
        [
            "What the module\nis for.\n\nA class.\n\nDedented\n    indented\n\nA coroutine.\n\n"
            "An inner function.",
            "A package.",
            "Café \\d.",
            "The for statement",
            "If.",
        ]
    )


def test_an_empty_library_has_no_documents(tmp_path):
    assert load_python_docs(tmp_path / "none") == {"train": [], "val": []}


def test_a_new_module_moves_at_most_one_other(stdlib):
    before = load_python_docs(stdlib)
    (stdlib / "new.py").write_text('"""New."""')
    after = load_python_docs(stdlib)
    assert len(set(before["val"]) ^ set(after["val"]) - {"New."}) <= 1


def test_every_process_reads_the_same(stdlib):
    code = (
        "import sys; from niels_gpt.data.python_docs import *; print(load_python_docs(sys.argv[1]))"
    )
    for seed in "1", "2":
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, str(stdlib)],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout == f"{load_python_docs(stdlib)}\n"


def test_the_running_python_gives_a_megabyte_of_prose_and_imports_nothing():
    loaded = set(sys.modules)
    docs = load_python_docs()
    assert set(sys.modules) == loaded
    train, val = "\n\n".join(docs["train"]), "\n\n".join(docs["val"])
    assert len(train) > 1_000_000
    assert 0.01 * len(train) < len(val) < 0.2 * len(train)
    for text in train, val:
        words = text.lower().split()
        assert 0.04 < words.count("the") / len(words) < 0.1
        assert sum(c.isascii() and (c.isalpha() or c.isspace()) for c in text) > 0.8 * len(text)
    assert not {*docs["train"]} & {*docs["val"]}
    assert python_docs_origin() == f"Python {sys.version.split()[0]} documentation"
