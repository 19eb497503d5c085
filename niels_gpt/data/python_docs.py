"""The fallback text: the English documentation that ships with every Python.

It consists of pydoc's topics (the language reference) and the docstrings of the standard library,
both read by parsing files: nothing is imported or run.
"""

import ast
import contextlib
import hashlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from niels_gpt.data.split import split_by_key

TOPICS = Path("pydoc_data", "topics.py")
VAL_FRAC = 0.05
_SPLIT_SEED = 0  # the text and its split depend on the Python, not on the run
# Not the library's own text, hardly any prose, or not in every build of one version.
_SKIPPED_FOLDERS = {
    "__pycache__", "dist-packages", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3",
    "pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo",
}  # fmt: skip


def python_docs_origin() -> str:
    """Return the name of the running Python's text."""
    return f"Python {platform.python_version()} documentation"


def python_docs_digest(stdlib: str | Path | None = None) -> str:
    """Return the SHA-256 of the files that the text is made of; some versions come in variants."""
    root = _root(stdlib)
    whole = hashlib.sha256()
    for path in sorted([root / TOPICS, *_modules(root)]):
        with contextlib.suppress(OSError):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            whole.update(f"{path.relative_to(root)} {content}\n".encode(errors="replace"))
    return whole.hexdigest()


def load_python_docs(stdlib: str | Path | None = None) -> dict[str, list[str]]:
    """Collect the documentation of the running Python as {"train": docs, "val": docs}.

    A document is one topic, or all docstrings of one module in file order. Documents are sorted
    and split by name. `stdlib` is the folder of the standard library; files in it that cannot be
    read or parsed are skipped.
    """
    root = _root(stdlib)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the library's strings
        docs = {**_topics(root), **_module_docs(root)}
    train, val = split_by_key(
        sorted(docs),
        lambda name: name.encode(errors="replace"),
        val_frac=VAL_FRAC,
        seed=_SPLIT_SEED,
    )
    return {"train": [docs[name] for name in train], "val": [docs[name] for name in val]}


def _root(stdlib: str | Path | None) -> Path:
    return Path(stdlib or sysconfig.get_path("stdlib"))


def _topics(root: Path) -> dict[str, str]:
    """Read the dict literal that `pydoc_data/topics.py` assigns."""
    body = getattr(_parse(root / TOPICS), "body", [])
    literals = [node.value for node in body if isinstance(node, ast.Assign | ast.AnnAssign)]
    tables = [ast.literal_eval(value) for value in literals if isinstance(value, ast.Dict)]
    return {f"topic {name}": str(text).strip() for table in tables for name, text in table.items()}


def _module_docs(root: Path) -> dict[str, str]:
    docs = {}
    for path in _modules(root):
        if text := "\n\n".join(_docstrings(_parse(path))):
            docs[path.relative_to(root).as_posix()] = text
    return docs


def _modules(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return ast.Module(body=[], type_ignores=[])


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(node):
            yield text.strip()
        for child in node.body:
            yield from _docstrings(child)
