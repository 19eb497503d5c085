"""Options that cannot mean anything: empty paths, and options without effect beside others."""

import click
import pytest

from niels_gpt import paths
from niels_gpt.cli import main
from tests.trained import save_lively


def commands(group=main, words=()):
    """Yield the words and the command of every command, subcommands included."""
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


PATHS = [
    (words, param)
    for words, command in commands()
    for param in command.params
    if isinstance(param.type, click.Path)
]


def test_the_paths_of_all_commands_are_found():
    named = {(words[0], param.name) for words, param in PATHS}
    assert {("train", "out"), ("train", "resume"), ("data", "roam"), ("sweep", "config")} <= named


@pytest.mark.parametrize(("words", "param"), PATHS, ids=lambda x: getattr(x, "name", None))
def test_an_empty_path_is_refused_before_it_means_the_current_folder(niels, tmp_path, words, param):
    option = [param.opts[0]] if isinstance(param, click.Option) else []
    result = niels(*words, *option, *[""] * max(1, param.nargs))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "the path is empty" in result.stderr
    assert [*tmp_path.iterdir()] == []


MODELS = {  # commands that use a model, and what makes them short
    "sample": ["--max-bytes", "1"],
    "chat": ["--message", "Hi", "--max-bytes", "1"],
    "evaluate": ["--text", "text.txt", "--full"],
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A checkpoint folder of this test."""
    monkeypatch.setattr(paths, "CHECKPOINT_DIR", tmp_path / "checkpoints")
    (tmp_path / "text.txt").write_text("a text")
    return tmp_path


@pytest.mark.parametrize("command", MODELS)
@pytest.mark.parametrize("names", [["latest.pt"], ["best.pt", "latest.pt"], ["step_0000003.pt"]])
def test_a_folder_or_nothing_is_the_best_of_a_run(niels, home, command, names):
    for folder in ("checkpoints", "other"):
        (home / folder).mkdir()
        for name in names:
            save_lively(home / folder / name)
    for given, folder in ([], "checkpoints"), (["--ckpt", "other"], "other"):
        result = niels(command, *given, *MODELS[command], "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert f"{folder}/{names[0]}\n" in result.stderr
    exact = niels(command, "--ckpt", f"other/{names[-1]}", *MODELS[command], "--device", "cpu")
    assert "note: using" not in exact.stderr


@pytest.mark.parametrize("command", [*MODELS, "inspect"])
def test_a_folder_without_checkpoints_is_refused_with_what_to_do(niels, home, command):
    absent = niels(command)
    (home / "checkpoints").mkdir()
    empty, named = niels(command), niels(command, "--ckpt", ".")
    for result, what in (
        (absent, "no such folder"),
        (empty, "no checkpoints"),
        (named, "no check"),
    ):
        assert (result.exit_code, result.stdout) == (2, "")
        said = " ".join(result.stderr.split())
        assert what in said
        assert "niels-gpt train --config quick" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("plot --table --out a.png", "--out has no effect with --table"),
        ("plot --json --out a.png", "--out has no effect with --json"),
        ("plot --json --table", "--json has no effect with --table"),
        ("sweep --config c --lr 1 --dry-run --picture a.png", "--picture has no effect with --dry"),
        ("sweep --config c --lr 1 --solo --memory 1", "--memory has no effect with --solo"),
        ("checkpoint diff a b -n 3 --json", "-n has no effect with --json"),
        ("sample --ckpt a --temperature 0 --top-k 3", "--top-k has no effect with --temperature 0"),
        ("chat --ckpt a --temperature 0 --top-p 1", "--top-p has no effect with --temperature 0"),
        ("train --config c --allow-data-change", "--allow-data-change requires --resume"),
    ],
)
def test_an_option_without_effect_is_refused(niels, words, message):
    result = niels(*words.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
