"""The `plot` command: loss and learning rate of runs, as a picture or a table."""

from pathlib import Path

import click

from niels_gpt import paths
from niels_gpt.analysis import plot
from niels_gpt.cli.shared.options import HELP, PATH, json_option, refuse_without_effect
from niels_gpt.cli.shared.output import console, exit_on_failure
from niels_gpt.run.metrics import damage_in

PICTURE = ("out", "title", "whole")  # options that only a picture has


@click.command(
    context_settings=HELP,
    epilog="Example: niels-gpt plot checkpoints/metrics.jsonl --x hours --out loss.png",
)
@click.argument("runs", type=PATH, nargs=-1, metavar="[METRICS.JSONL]...")
@click.option(
    "--x",
    type=click.Choice(list(plot.X_AXES)),
    default="steps",
    show_default=True,
    help="Quantity on the x axis.",
)
@click.option(
    "--out",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="Picture, .png or .svg (default: loss.png and loss.svg beside the run).",
)
@click.option(
    "--title",
    multiple=True,
    metavar="TEXT",
    help="Title, a line each (default: the run, its model and text).",
)
@click.option("--whole", is_flag=True, help="Show the steep start too.")
@click.option("--table", "as_table", is_flag=True, help="Print the numbers, draw nothing.")
@json_option("Print the numbers as JSON, draw nothing.")
def main(
    runs: tuple[Path, ...],
    x: str,
    out: tuple[Path, ...],
    title: tuple[str, ...],
    whole: bool,
    as_table: bool,
    as_json: bool,
) -> None:
    """Plot the losses and learning rate of runs.

    Takes the metrics.jsonl of each run, or its folder (default: the checkpoint folder). Draws with
    matplotlib, into the folder of the run (of several: the folder around theirs); prints the
    numbers if that is not installed.
    """
    if as_table:
        refuse_without_effect("with --table, which draws nothing", *PICTURE, "as_json")
    if as_json:
        refuse_without_effect("with --json, which draws nothing", *PICTURE)
    with exit_on_failure(2):
        plot.check_paths(out)
        given = list(runs) or [paths.CHECKPOINT_DIR]
        found = [plot.read_curves(path, x) for path in given]
        console.tell(*(line for path in given for line in damage_in(plot.metrics_file(path))))
        labels = plot.distinct_labels([run.label for run in found])
        found = [run._replace(label=label) for run, label in zip(found, labels, strict=True)]
        if as_json:
            console.result(found, (), as_json=True)
        elif as_table or not plot.have_matplotlib():
            console.say(*plot.table(found, x))
            if not as_table:
                console.warn(plot.INSTALL)
        else:
            pictures = list(out) or plot.default_pictures(given)
            lines = title or plot.title_of(given, labels)
            plot.save(found, x, pictures, title=lines, whole=whole)
            console.say(*map(str, pictures))
