"""The `config` commands: show a resolved config, or write one for the time there is."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from niels_gpt import paths
from niels_gpt.analysis.config_report import DEFAULT, OVERRIDE, Setting, resolve
from niels_gpt.cli.shared.options import (
    CONFIG,
    HELP,
    PATH,
    Commands,
    device_option,
    json_option,
    mix_option,
    set_option,
    source_options,
)
from niels_gpt.cli.shared.output import console, exit_on_failure
from niels_gpt.config import TrainConfig, find_config, save_json
from niels_gpt.data.sources import Given

if TYPE_CHECKING:
    from niels_gpt.analysis.fit import Fit

WIDTH = 80  # columns


@click.group(cls=Commands, context_settings=HELP)
def main() -> None:
    """Show a resolved config, or write one for the time there is."""


@main.command(
    epilog="Example: niels-gpt config show --config smoke --set train.B=16",
)
@click.option(
    "--config",
    type=CONFIG,
    metavar="FILE",
    help="JSON config, or a bare name (default: only defaults).",
)
@set_option
@json_option()
def show(config: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show every value of a config and where it comes from.

    The origin is the default, the file, or --set. With --json, the field `config` is a complete
    config that can be saved as a file.
    """
    with exit_on_failure(2):
        settings, resolved = resolve(None if config is None else find_config(config), overrides)
    value = {"config": resolved, "from": {s.key: s.origin for s in settings}}
    console.result(value, _lines(settings), as_json=as_json)


@main.command(epilog="Example: niels-gpt config fit --time 8h --wiki data/wiki --notes ~/notes")
@click.option("--time", required=True, metavar="TIME", help="E.g. 90s, 20m or 8h.")
@click.option(
    "--out", type=PATH, metavar="FILE", help="Config to write (default fit-TIME.json in configs/)."
)
@source_options
@mix_option
@device_option()
@json_option()
def fit(time: str, out: Path | None, given: Given, device: str, as_json: bool) -> None:
    """Write the config that promises the least loss in a time, on this machine and text.

    Measures the speed of a few networks for about half a minute. Run nothing else meanwhile.
    """
    with exit_on_failure(2):
        from niels_gpt.analysis.fit import parse_time

        seconds = parse_time(time)
        out = out or paths.CONFIG_DIR / f"fit-{time.strip()}.json"
        if out.exists():
            raise FileExistsError(f"{out}: already exists; remove it or give another --out")
        found = _fit(seconds, given, device)
        out.parent.mkdir(parents=True, exist_ok=True)
        save_json(out, found.config)
    value = {**found._asdict(), "out": str(out)}
    lines = [f"{what:<9}{why}" for what, why in found.reasons.items()]
    lines += [f"warning: {warning}" for warning in found.warnings]
    console.result(value, [*lines, f"written to {out}"], as_json=as_json)


def _fit(seconds: float, given: Given, device: str) -> Fit:
    """Open the text, measure this machine, and choose."""
    from niels_gpt.analysis import fit, scaling
    from niels_gpt.corpus import as_given, open_corpus
    from niels_gpt.device import BUSY, is_busy, keep_freed_memory

    keep_freed_memory()
    model_cfg = scaling.model_config(*scaling.SHAPES[0])
    cfg, where = as_given(TrainConfig(), given)
    corpus = open_corpus(model_cfg, cfg, where)
    console.tell(*corpus.messages, *([BUSY] if is_busy() else []))
    return fit.fit(seconds, corpus, device, fit.measure(corpus, device))


def _lines(settings: list[Setting]) -> list[str]:
    """Return a table of 80 columns; a meaning that is longer goes on below itself."""
    rows = [("key", "value", "from", "meaning"), *(_row(s) for s in settings)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    left = sum(widths) + 2 * len(widths)
    lines = []
    for *cells, meaning in rows:
        first = "".join(f"{cell:<{w}}  " for cell, w in zip(cells, widths, strict=True))
        for part in textwrap.wrap(meaning, max(20, WIDTH - left)):
            lines.append(first + part)
            first = " " * left
    files = {s.origin for s in settings} - {DEFAULT, OVERRIDE}
    return [*lines, *(f"{Path(file).name} is {file}" for file in files if Path(file).name != file)]


def _row(s: Setting) -> tuple[str, str, str, str]:
    changed = s.default is not None and s.value != s.default
    origin = s.origin if s.origin in (DEFAULT, OVERRIDE) else Path(s.origin).name
    return s.key, str(s.value), origin, s.meaning + f" (default {s.default})" * changed
