"""The documents tell the truth: the script runs, the tree names every file, the table every key."""

import re

from niels_gpt.cli import main
from niels_gpt.config import SECTIONS, to_dict
from tests import ROOT

README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
CONFIG = (ROOT / "docs" / "config.md").read_text()


def blocks(language, document=README):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", document, flags=re.DOTALL | re.MULTILINE)
    return [text for label, text in fenced if label == language]


def test_the_script_runs_and_learns(monkeypatch, capsys):
    (script,) = blocks("python")
    assert len([line for line in script.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(ROOT)
    exec(compile(script, "README.md", "exec"), {})
    training_loss, validation_loss = map(float, capsys.readouterr().out.split())
    assert max(training_loss, validation_loss) < 3.5  # 5.5 before


def test_the_tree_names_every_file_of_the_package():
    (tree,) = (block for block in blocks("", ARCHITECTURE) if "niels_gpt/\n" in block)
    for file in (ROOT / "niels_gpt").iterdir():
        if file.name in ("__init__.py", "__main__.py", "py.typed") or file.name[0] in "_.":
            continue
        assert file.name + "/" * file.is_dir() in tree, file.name
    for name in re.findall(r"\b\w+\.py\b", tree):
        assert list((ROOT / "niels_gpt").rglob(name)), name


def test_every_key_of_a_config_is_in_the_table():
    for section, config in SECTIONS.items():
        for key in to_dict(config()):
            assert re.search(rf"`({section}\.)?{key}`", CONFIG), key


def test_the_readme_names_every_config():
    for path in (ROOT / "configs").glob("[!f]*.json"):  # not what `config fit` writes there
        assert f"configs/{path.name}" in README, path.name


def test_the_readme_links_the_page_of_every_command():
    for command in main.list_commands(None):
        assert f"[`{command}`](docs/{command}.md)" in README, command


def test_what_is_linked_exists():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_every_test_that_a_document_names_exists():
    tests = ROOT / "tests"
    files = {p.relative_to(tests).as_posix(): p.read_text() for p in tests.rglob("test_*.py")}
    for document in ("laws.md", "reliability.md"):
        text = (ROOT / "docs" / document).read_text()
        for file, name in re.findall(r"`(?:([\w/]+\.py)::)?(test_\w+)`", text):
            among = [files.get(file, "")] if file else files.values()
            assert any(f"def {name}(" in source for source in among), f"{document}: {file} {name}"
