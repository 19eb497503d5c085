"""The `train` command: parse, plan, run.

`make_state`, `train_step` and `evaluate` can be imported from here as well (loaded on first use).
"""

from pathlib import Path
from typing import Any

import click

from niels_gpt.cli.shared.options import source_options

_STEP_FUNCTIONS = ("evaluate", "make_state", "train_step")

_FOLDER = click.Path(path_type=Path)
_NAME = click.Path()  # a str: a word may stand for a file; the type completes file names


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    epilog="Example: train --config configs/smoke.json --roam ~/notes --out checkpoints/first",
)
@click.option(
    "--config", type=_NAME, required=True, metavar="FILE", help="JSON config, or a bare name."
)
@click.option(
    "--resume", type=_NAME, metavar="PATH", help="Checkpoint to go on from, or the word `latest`."
)
@click.option("--device", metavar="NAME", help="cpu, mps or cuda; by default mps where it is.")
@click.option("--out", type=_FOLDER, metavar="DIR", help="Output folder (default checkpoints/).")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="E.g. train.B=16.")
@source_options
@click.option("--compile/--no-compile", "compile_step", default=None, help="Compile the step.")
@click.option("--dry-run", is_flag=True, help="Check and estimate everything, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print the estimate as JSON.")
@click.option("--allow-data-change", is_flag=True, help="Resume on text other than before.")
def main(
    config: str,
    resume: str | None,
    device: str | None,
    out: Path | None,
    overrides: tuple[str, ...],
    places: dict[str, Path],
    compile_step: bool | None,
    dry_run: bool,
    as_json: bool,
    allow_data_change: bool,
) -> None:
    """Train a byte-level GPT from a JSON config."""
    if as_json and not dry_run:
        raise click.UsageError("--json goes with --dry-run; a run writes metrics.jsonl")
    from niels_gpt.run.launch import carry_out
    from niels_gpt.run.options import TrainOptions

    options = TrainOptions(
        config=config,
        overrides=overrides,
        resume=resume,
        device=device,
        out=out,
        places=places,
        compile=compile_step,
        allow_data_change=allow_data_change,
        dry_run=dry_run,
        as_json=as_json,
    )
    raise SystemExit(carry_out(options))


def __getattr__(name: str) -> Any:
    if name in _STEP_FUNCTIONS:
        import niels_gpt

        return getattr(niels_gpt, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    main()
