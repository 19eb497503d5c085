"""Options that cannot mean anything: empty paths, and options without effect beside others."""

import click
import pytest

from niels_gpt.cli import main


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
