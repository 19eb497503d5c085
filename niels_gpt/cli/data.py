"""The `data` commands: describe, build, fetch and sample the training text."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from niels_gpt.cli.shared.options import (
    CONFIG,
    HELP,
    Command,
    Commands,
    json_option,
    mix_option,
    refuse_without_effect,
    source_options,
)
from niels_gpt.cli.shared.output import console, exit_on_failure
from niels_gpt.config import ModelConfig, TrainConfig, read_config
from niels_gpt.data.sources import Given

if TYPE_CHECKING:
    from niels_gpt.analysis.data_report import Source
    from niels_gpt.data.recipe import Remark
    from niels_gpt.streams import Sources, StreamBuildConfig

SHOWN = 20  # lines of a list


def _config_option(command: Command) -> Command:
    return click.option(
        "--config",
        type=CONFIG,
        metavar="FILE",
        help="Config for seed, T and shares, or a bare name (default: the defaults).",
    )(command)


@click.group(cls=Commands, context_settings=HELP)
def main() -> None:
    """Describe, build and fetch the training text."""


@main.command(epilog="Example: niels-gpt data info --notes ~/notes")
@_config_option
@source_options
@json_option()
def info(config: str | None, given: Given, as_json: bool) -> None:
    """Show each source and what was left out.

    Prints its location, its splits with sizes and digests, the state of the cache, and every file
    left out with the reason. Writes and downloads nothing.
    """
    with exit_on_failure(2, busy="reading the text"):
        from niels_gpt.analysis.data_report import survey

        found = survey(_where(config, given)[2])
    lines = [line for source in found for line in _source_lines(source)]
    console.result(found, lines, as_json=as_json)
    with exit_on_failure(2):
        for source in found:
            if source.name in given.places and source.problem is not None:
                raise ValueError(source.problem)


@main.command(epilog="Example: niels-gpt data build --notes ~/notes")
@_config_option
@source_options
@click.option("--rebuild", is_flag=True, help="Rebuild cached streams too.")
@click.option("--verify", is_flag=True, help="Compare every byte in the cache with its digest.")
@json_option()
def build(
    config: str | None,
    given: Given,
    rebuild: bool,
    verify: bool,
    as_json: bool,
) -> None:
    """Build the streams before a training run.

    What in the cache does not match its digest is rebuilt, and that is said. Streams of 64 MiB and
    more are compared only with --verify, or if their file is not as it was written.

    A source that you name must have text; the other sources are built if they exist.
    """
    if rebuild:
        refuse_without_effect("with --rebuild", "verify")
    with exit_on_failure(2, busy="reading the text"):
        from niels_gpt.streams import build_sources

        train, val = build_sources(
            replace(
                _where(config, given)[2],
                required_sources=("wiki",) if "wiki" in given.places else (),  # as in a run
                force_rebuild=rebuild,
                verify=verify,
            )
        )
    console.tell(*train.messages, *train.left_out())
    _show_streams(train, val, as_json)


@main.command(epilog="Example: niels-gpt data fetch")
@json_option()
def fetch(as_json: bool) -> None:
    """Download WikiText-103 into the cache.

    After that no network is needed. Requires the extra `wiki`. An interrupted download continues
    where it stopped.
    """
    with exit_on_failure(2):
        from niels_gpt.streams import fetch_wikitext

        train, val = fetch_wikitext()
    console.tell(*train.messages)
    _show_streams(train, val, as_json)


@main.command(epilog="Example: niels-gpt data sample --config smoke --notes ~/notes -n 3")
@_config_option
@source_options
@mix_option
@click.option("--step", type=click.IntRange(1), default=1, show_default=True, help="Which step.")
@click.option("-n", "n", type=click.IntRange(1), default=3, show_default=True, help="Rows to show.")
@json_option()
def sample(
    config: str | None,
    given: Given,
    step: int,
    n: int,
    as_json: bool,
) -> None:
    """Print training windows as the model sees them.

    Shows the first rows of a step's batch, as a run with this config and text draws them.
    """
    with exit_on_failure(2, busy="reading the text"):
        model_cfg, train_cfg, where = _where(config, given)
        from niels_gpt.corpus import open_corpus

        corpus = open_corpus(model_cfg, train_cfg, where)
        rows = corpus.rows(step - 1)[:n]
    console.tell(*corpus.messages)
    lines = [
        line
        for row in rows
        for line in (
            f"--- step {step}, row {row.row}: {row.source} from byte {row.start:,} ---",
            *row.text.split("\n"),
        )
    ]
    console.result(rows, lines, as_json=as_json)


def _where(config: str | None, given: Given) -> tuple[ModelConfig, TrainConfig, StreamBuildConfig]:
    """Return the configs, and how to read the sources under them."""
    from niels_gpt.corpus import as_given

    document = None if config is None else read_config(config)
    model_cfg, train_cfg = ModelConfig(), TrainConfig()
    if document is not None:
        model_cfg, train_cfg = document.configs()
    train_cfg, where = as_given(train_cfg, given, document)
    where = replace(where, T=model_cfg.T, seed=train_cfg.seed, wiki_fallback=True)
    return model_cfg, train_cfg, where


def _show_streams(train: Sources, val: Sources, as_json: bool) -> None:
    from niels_gpt.streams import describe_sources

    found = {split: describe_sources(s) for split, s in (("train", train), ("val", val))}
    lines = [
        f"{f'{split}/{name}':<14}{info}"
        for split, infos in found.items()
        for name, info in infos.items()
    ]
    console.result(found, lines, as_json=as_json)


def _source_lines(source: Source) -> list[str]:
    if source.problem is not None:
        lines = [f"{source.name:<8}not available: {source.problem}"]
    else:
        files = "" if source.files is None else f", {_count(source.files, 'file')}"
        place = f" in {source.place}" if source.place else ""
        lines = [f"{source.name:<8}{source.origin}{place}{files}"]
    for split, s in source.splits.items():
        documents = "" if s.documents is None else f"{_count(s.documents, 'document')}, "
        lines.append(
            f"  {split:<6}{documents}{s.nbytes:,} bytes, sha256 {s.sha256[:12]}, {s.cache}"
        )
    lines += [f"  note: {message}" for message in source.messages]
    lines += _listed("left out", source.left_out) + _listed("altered", source.altered)
    return lines


def _count(n: int, thing: str) -> str:
    return f"{n:,} {thing}" + "s" * (n != 1)


def _listed(what: str, files: list[Remark]) -> list[str]:
    lines = [f"  {what}: {file.path}: {file.reason}" for file in files[:SHOWN]]
    if (more := len(files) - SHOWN) > 0:
        lines.append(f"  {what}: and {more:,} more (--json lists them all)")
    return lines
