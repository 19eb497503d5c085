"""The `train` command: parse, plan, run.

`make_state`, `train_step` and `evaluate` can also be imported from here (loaded on first use).
"""

from typing import Any

import click

from niels_gpt.cli.shared.options import (
    CONFIG,
    FILE,
    HELP,
    PATH,
    mix_option,
    set_option,
    source_options,
)
from niels_gpt.cli.shared.output import EnduringConsole, Script
from niels_gpt.cli.shared.program import this_program
from niels_gpt.run.options import TrainOptions

_STEP_FUNCTIONS = ("evaluate", "make_state", "train_step")


@click.command(
    cls=Script,
    context_settings={**HELP, "show_default": True},
    epilog="Example: train --config quick --text novel.txt --out checkpoints/first",
)
@click.option(
    "--config", type=CONFIG, metavar="FILE", help="JSON config, or a bare name (required)."
)
@click.option(
    "--resume", type=FILE, metavar="PATH", help="Checkpoint to resume, or the word `latest`."
)
@click.option(
    "--from", "parent", type=FILE, metavar="PATH", help="Start from a checkpoint's weights."
)
@click.option("--device", metavar="NAME", help="cpu, mps or cuda; default mps, else cpu.")
@click.option("--out", type=PATH, metavar="DIR", help="Output folder (default checkpoints/).")
@set_option
@source_options
@mix_option
@click.option("--compile/--no-compile", default=None, help="Compile the step.")
@click.option("--sample/--no-sample", default=True, help="Print a sample of the model at the end.")
@click.option("--sample-every-eval", is_flag=True, help="Print one with each evaluation too.")
@click.option("--dry-run", is_flag=True, help="Check and estimate everything, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print the estimate as JSON.")
@click.option("--allow-data-change", is_flag=True, help="Allow resuming on different text.")
def main(**given: Any) -> None:
    """Train a byte-level GPT from a JSON config."""
    options = TrainOptions(**given, program=this_program())
    if options.config is None and options.resume is None:
        raise click.UsageError("Missing option '--config'; only --resume can go without it")
    if options.as_json and not options.dry_run:
        raise click.UsageError("--json requires --dry-run; a run writes metrics.jsonl")
    if options.sample_every_eval and not options.sample:
        raise click.UsageError("--sample-every-eval has no effect with --no-sample")
    if options.allow_data_change and options.resume is None:
        raise click.UsageError("--allow-data-change requires --resume")
    if None not in (options.resume, options.parent):
        raise click.UsageError(
            "--resume continues a run, --from starts a new one from its weights: give one of them"
        )
    from niels_gpt.run.launch import run_command

    raise SystemExit(run_command(options, EnduringConsole()))


def __getattr__(name: str) -> Any:
    if name in _STEP_FUNCTIONS:
        import niels_gpt

        return getattr(niels_gpt, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    main()
