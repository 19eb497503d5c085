"""Every command in a document is one that its program accepts, with keys and configs that exist.

What a finished run prints is run as printed in `run/test_next_steps.py`; of the documents' commands
some take an hour, so that here they are parsed.
"""

import configparser
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest

from niels_gpt.cli import main
from niels_gpt.config import find_config, load_config_from_json
from tests import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FAULTS = ("train.totl_steps=5", "B=5", "train.optimizer=moun", "damaged.pt")  # shown to be refused


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command in the text's shell blocks and inline code.

    Left out are those that stand for others (`train ...`, `train --from`).
    """
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
    lines = [
        line
        for language, block in fenced.findall(text)
        if language in ("sh", "")
        for line in block.replace("\\\n", " ").splitlines()
        if language == "sh" or line.startswith("$ ")
    ]
    lines += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", fenced.sub("", text))]
    for line in lines:
        for command in re.split(r" && | \| | > | 2> ", line.removeprefix("$ ")):
            if re.search(r"\.\.\.|^\s*#", command):
                continue
            try:
                words = shlex.split(command, comments=True)
            except ValueError:  # inline code that is no command
                continue
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words and "|" not in words and not words[-1].startswith("--"):
                yield words


def program(words: list[str]) -> tuple[click.Command, list[str]] | None:
    """Return the command that these words start, and what is left of them for it."""
    name, *rest = words
    name = name.removeprefix(".venv/bin/")
    if name in ("python", ".venv/bin/python") and rest[:1] == ["-m"]:
        module, rest = rest[1], rest[2:]
        if module.startswith(("niels_gpt", "benchmarks")):
            if hasattr(found := import_module(module), "__path__"):
                found = import_module(f"{module}.__main__")
            return found.main, rest
    if name == "train":
        return main.get_command(click.Context(main), "train"), rest
    return (main, rest) if name == "niels-gpt" else None


def parse(command: click.Command, words: list[str]) -> dict[str, object]:
    """Parse the words as click does, and return the values by parameter; nothing is run."""
    context = click.Context(command, info_name=command.name)
    if isinstance(command, click.Group) and words and not words[0].startswith("-"):
        _, found, rest = command.resolve_command(context, words)
        return parse(found, rest)
    given, left, _ = command.make_parser(context).parse_args(list(words))
    assert not left or isinstance(command, click.Group), left
    values = {}
    for param in command.params:
        value = given.get(param.name)
        if isinstance(value, str | list | tuple) and not isinstance(param.type, click.Path):
            value = param.type_cast_value(context, value)
        values[param.name] = value
    return values


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_a_document_is_accepted(document: Path):
    for words in commands(document.read_text()):
        found = program(words)
        if found is None or any(word in FAULTS for word in words):
            continue
        try:
            values = parse(*found)
        except click.ClickException as error:
            pytest.fail(f"{shlex.join(words)}: {error.format_message()}")
        config = values.get("config")
        if isinstance(config, str) and Path(config).name != "mine.json":
            load_config_from_json(find_config(config), values.get("overrides") or ())


def test_every_environment_that_a_document_names_exists():
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    known = {name.removeprefix("testenv:") for name in tox.sections()}
    known |= {name.strip() for name in tox["tox"]["env_list"].split(",")}
    for document in DOCUMENTS:
        for words in commands(document.read_text()):
            if words[0].endswith("tox") and "-e" in words:
                name = words[words.index("-e") + 1]
                name = re.sub(r"^py\d+-", "", name)  # on another Python
                assert name in known, f"{document.name}: {shlex.join(words)}"


def test_most_documents_have_a_command():
    """The two tests above find what they look for."""
    counts = {
        d.name: sum(program(w) is not None for w in commands(d.read_text())) for d in DOCUMENTS
    }
    assert counts["README.md"] >= 10
    assert sum(count > 0 for count in counts.values()) > len(counts) // 2
