"""Peak memory and start time of a run by the size of its text, which is repeated or sparse.

python -m benchmarks.large_text --wiki DIR 20 2000 20000
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import click

from niels_gpt.paths import REPO_ROOT

MB = 1_000_000
STEPS = 5
NETWORK = {"model.C": 64, "model.d_ff": 256, "model.T": 128, "model.L": 2, "model.dropout": 0}
RUN = {"train.total_steps": STEPS, "train.log_every": 1, "train.eval_steps": 2, "train.B": 8}
MIX = {"train.p_train.wiki": 1, "train.p_train.roam": 0, "train.p_train.primer": 0}
LAUNCH = """
import os, pathlib
from niels_gpt import paths
paths.REPO_ROOT = pathlib.Path(os.environ["TEXT_HOME"])
paths.CHECKPOINT_DIR = paths.REPO_ROOT / "checkpoints"
from niels_gpt.cli import main
main()
"""


class Cost(NamedTuple):
    """What a command took."""

    seconds: float
    first: float | None  # seconds to the first step's line
    peak: int  # resident bytes


@click.command()
@click.argument("sizes", type=int, nargs=-1, required=True, metavar="MEGABYTES...")
@click.option("--wiki", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--sparse", type=int, help="From this size on, zeros that take no space.")
@click.option("--tmp", type=click.Path(exists=True, path_type=Path), help="Where to work.")
@click.option(
    "--before",
    type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
    help="Another checkout, to measure too.",
)
def main(
    sizes: tuple[int, ...], wiki: Path, sparse: int | None, tmp: Path | None, before: Path | None
) -> None:
    """Build text of each size in a folder of its own, then train on it from the cache."""
    checkouts = {"": REPO_ROOT, **({", before": before} if before else {})}
    for size, when in itertools.product(sizes, checkouts):
        with tempfile.TemporaryDirectory(dir=tmp) as folder:
            lay_out(Path(folder), wiki, size * MB, is_sparse=bool(sparse and size >= sparse))
            for name, command in commands(checkouts[when]).items():
                cost = measure(checkouts[when], Path(folder), *command)
                first = f", first step after {cost.first:.1f} s" if cost.first else ""
                click.echo(
                    f"{size:>6,} MB{when}  {name:15} peak {cost.peak / MB:5.0f} MB, "
                    f"{cost.seconds:6.1f} s{first}"
                )


def commands(checkout: Path) -> dict[str, list[str]]:
    """Return the commands to measure; the full check is this checkout's alone."""
    sets = [w for k, v in (NETWORK | RUN | MIX).items() for w in ("--set", f"{k}={v}")]
    check = {"build --verify": ["data", "build", "--verify"]} if checkout == REPO_ROOT else {}
    train = ["train", "--config", "quick", "--no-compile", *sets]
    return {"build": ["data", "build"], "train": train, **check}


def lay_out(home: Path, wiki: Path, size: int, *, is_sparse: bool) -> None:
    """Make the wiki folder of a home, with a training text of this size."""
    folder = home / "data" / "wiki"
    folder.mkdir(parents=True)
    (folder / "val.txt").write_bytes((wiki / "val.txt").read_bytes())
    with (wiki / "train.txt").open("rb") as text, (folder / "train.txt").open("wb") as file:
        length = os.fstat(text.fileno()).st_size
        while not is_sparse and 0 < file.tell() + length <= size:
            text.seek(0)  # in parts: this process's peak is a floor of that of its children
            shutil.copyfileobj(text, file)
        file.truncate(size)


def measure(checkout: Path, home: Path, *command: str) -> Cost:
    """Run a command of a checkout's package in a process of its own."""
    environment = {**os.environ, "TEXT_HOME": str(home), "PYTHONPATH": str(checkout)}
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=checkout,
        env=environment,
    ) as process:
        assert process.stdout is not None
        first = None
        for line in process.stdout:
            if first is None and line.startswith(b"step "):
                first = time.perf_counter() - started
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{' '.join(command)}: exit code {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(time.perf_counter() - started, first, usage.ru_maxrss * unit)


if __name__ == "__main__":
    main()
