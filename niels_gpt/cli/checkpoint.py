"""The `checkpoint` commands: inspect, verify, compare and export checkpoints."""

from __future__ import annotations

import math
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from niels_gpt.cli.shared.options import HELP, PATH, Commands, json_option, refuse_without_effect
from niels_gpt.cli.shared.output import console, exit_on_failure

if TYPE_CHECKING:
    from niels_gpt.analysis.checkpoint_report import Comparison, Verdict


MAX_LINE = 10_000  # characters


@click.group(cls=Commands, context_settings=HELP)
def main() -> None:
    """Inspect, verify, compare and export checkpoints."""


@main.command(epilog="Example: niels-gpt checkpoint info checkpoints/latest.pt")
@click.argument("path", type=PATH)
@json_option()
def info(path: Path, as_json: bool) -> None:
    """Show the content of a checkpoint.

    Prints its step, losses and configs, and the text and environment it was trained with.
    """
    with exit_on_failure(2):
        from niels_gpt.analysis.checkpoint_report import describe_checkpoint

        found = describe_checkpoint(path)
    console.result(found, _info_lines(found), as_json=as_json)


@main.command(epilog="Example: niels-gpt checkpoint verify checkpoints/")
@click.argument("paths", type=PATH, nargs=-1, required=True, metavar="PATH...")
@json_option()
def verify(paths: tuple[Path, ...], as_json: bool) -> None:
    """Verify every byte of checkpoints.

    Takes files and folders of checkpoints, and exports. Exit code 0 if all are good, 1 if any is
    bad.
    """
    with exit_on_failure(2):
        from niels_gpt.analysis import checkpoint_report

        files = [file for path in paths for file in checkpoint_report.checkpoints_in(path)]
        verdicts = [checkpoint_report.verify(file) for file in files]
    value = [{**v._asdict(), "path": str(v.path)} for v in verdicts]
    console.result(value, map(_verdict_line, verdicts), as_json=as_json)
    sys.exit(1 if any(v.problem for v in verdicts) else 0)


@main.command(epilog="Example: niels-gpt checkpoint diff checkpoints/best.pt checkpoints/latest.pt")
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@click.option(
    "-n", "n", type=click.IntRange(0), default=10, show_default=True, help="Parameters to show."
)
@json_option()
def diff(a: Path, b: Path, n: int, as_json: bool) -> None:
    """Show how checkpoint B differs from A.

    Prints changed settings, step and losses, and the parameters that changed most.
    """
    if as_json:
        refuse_without_effect("with --json, which has all parameters", "n")
    with exit_on_failure(2):
        from niels_gpt.analysis.checkpoint_report import compare
        from niels_gpt.checkpoint import open_checkpoint

        found = compare(open_checkpoint(a), open_checkpoint(b))
    console.result(found, _diff_lines(found, n), as_json=as_json)


@main.command(epilog="Example: niels-gpt checkpoint export checkpoints/best.pt model.safetensors")
@click.argument("path", type=PATH)
@click.argument("out", type=PATH)
@click.option("--force", is_flag=True, help="Replace existing files.")
def export(path: Path, out: Path, force: bool) -> None:
    """Write the model as safetensors.

    Writes the config as .json beside it. The output layer shares its weight with the embedding,
    which is stored once, as tok_emb.weight.
    """
    with exit_on_failure(2):
        from niels_gpt.inference.export import export as write_export

        written = write_export(path, out, overwrite=force)
    console.say(*map(str, written))


def _info_lines(found: dict[str, Any]) -> list[str]:
    best, at = found["best_val_loss"], found["scores"]["best_step"]
    when = "" if at is None else f" after step {at:,}"
    judge = found["val_source"]
    facts = [
        ("file", f"{found['path']}, {found['file_bytes']:,} bytes"),
        ("digest", found["digest"] or "none: written by another program"),
        ("step", f"{found['step']:,}"),
        ("best loss", "-" if best is None else f"{best:.4f} nats ({judge}){when}"),
        ("parameters", f"{found['parameters']:,}"),
        ("model", _pairs(found["model_cfg"])),
        ("train", _pairs(found["train_cfg"])),
        *(
            (
                "before that" if i else "began with",
                f"the weights after step {step:,} of another run, sha256 {digest[:12]}",
            )
            for i, (digest, step) in enumerate(found["ancestors"])
        ),
        ("trained with", _pairs(found["environment"]) or "-"),
        *(
            (
                f"{split}/{name}",
                f"{text['origin']}, {text['bytes']:,} bytes, sha256 {text['sha256'][:12]}",
            )
            for split, sources in found["sources"].items()
            for name, text in sources.items()
        ),
        *(("note", message) for message in found["messages"]),
    ]
    return [
        line
        for name, fact in facts
        for line in textwrap.wrap(_cut(f"{name:<14}{fact}"), 100, subsequent_indent=" " * 14)
    ]


def _cut(line: str) -> str:
    """Cut a long line: to wrap a word takes time quadratic in its length."""
    rest = len(line) - MAX_LINE
    return line if rest <= 0 else f"{line[:MAX_LINE]}... ({rest:,} more characters; see --json)"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} ({_pairs(value)})" if isinstance(value, dict) else f"{key} {value}"
        for key, value in values.items()
    )


def _verdict_line(v: Verdict) -> str:
    if v.problem is not None:
        return f"BAD   {v.path}: {v.problem}"
    checked = f"sha256 {v.digest[:12]}" if v.digest else "no digest, but CRCs and content are good"
    return f"good  {v.path}: step {v.step:,}, {checked}"


def _percent(ratio: float) -> str:
    return "from zero" if math.isinf(ratio) else f"{100 * ratio:.3g} %"


def _diff_lines(found: Comparison, n: int) -> list[str]:
    lines = [f"{key}: {a} -> {b}" for key, a, b in found.settings]
    if found.unlike:
        lines.append(
            f"{len(found.unlike)} parameters have different shapes or are in only one of them"
        )
    if found.parameters:
        lines += [
            "",
            "the parameters that changed most, by the size of the change relative to that in A:",
            f"{'parameter':<28}  {'change':>9}  {'largest element':>15}",
        ]
        lines += [
            f"{c.name:<28}  {_percent(c.relative):>9}  {c.largest:15.3g}"
            for c in found.parameters[:n]
        ]
        if (more := len(found.parameters) - n) > 0:
            lines.append(f"and {more} more")
    if found.same:
        lines.append(f"{found.same} parameters are the same, bit for bit")
    return lines
