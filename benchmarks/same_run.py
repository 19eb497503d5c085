"""Check whether two checkouts train to the same bytes: `python -m benchmarks.same_run OTHER`.

Both make the same few short runs, of text that both build anew: with dropout, killed and
resumed, with the default model, compiled. Every checkpoint must be equal byte for byte, as must
`metrics.jsonl` except for its clock fields. Then this checkout resumes a checkpoint of the other.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click

from niels_gpt.paths import REPO_ROOT

CLOCK_FIELDS = ("seconds", "bytes_per_s")
Settings = dict[str, object]

TINY: Settings = {
    "model.T": 64,
    "model.C": 32,
    "model.d_ff": 64,
    "model.dropout": 0.1,
    "train.B": 8,
}
SHORT: Settings = {"train.total_steps": 40, "train.eval_every": 15, "train.eval_steps": 2}
OFTEN: Settings = {"train.ckpt_every": 10, "train.log_every": 5, "train.warmup_steps": 5}

RUNS: dict[str, tuple[str, Settings, str, bool]] = {  # config, --set, flag, killed
    "with dropout": ("smoke", TINY | SHORT | OFTEN, "--no-compile", False),
    "killed and resumed": ("smoke", TINY | SHORT | OFTEN, "--no-compile", True),
    "default model": ("smoke", SHORT | {"train.total_steps": 3}, "--no-compile", False),
    "compiled": ("smoke", TINY | SHORT | OFTEN, "--compile", False),
}


def command(config: str, settings: Settings, *more: object) -> list[str]:
    """Return a `train` command."""
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    first = [sys.executable, "-m", "niels_gpt.train", "--config", config, "--device", "cpu"]
    return [*first, *sets, *map(str, more)]


def run(checkout: Path, words: Sequence[str], out: Path, *, kill: bool = False) -> None:
    """Run a command with the package of a checkout; kill it once it has saved step 20."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        words, cwd=checkout, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while kill and process.poll() is None:
            if (out / "step_0000020.pt").exists():
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        _, problem = process.communicate()
    if process.returncode != (-signal.SIGKILL if kill else 0):
        raise click.ClickException(f"{checkout}: exit {process.returncode}: {problem.decode()}")


def fingerprints(folder: Path) -> dict[str, str]:
    """Return a digest of each file of a run, without clock fields."""
    found = {}
    for path in sorted([*folder.glob("*.pt"), folder / "metrics.jsonl"]):
        data = path.read_bytes()
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in data.splitlines()]
            kept = [{k: v for k, v in r.items() if k not in CLOCK_FIELDS} for r in records]
            data = json.dumps(kept).encode()
        found[path.name] = hashlib.sha256(data).hexdigest()
    return found


@click.command()
@click.argument("other", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--wiki", type=click.Path(path_type=Path), help="Folder with train.txt and val.txt.")
@click.option("--roam", type=click.Path(path_type=Path), help="Folder of markdown notes.")
def main(other: Path, wiki: Path | None, roam: Path | None) -> None:
    """Compare the runs of this checkout with those of OTHER."""
    places = {"--wiki": wiki, "--roam": roam, "--primer": REPO_ROOT / "data" / "primer.txt"}
    text = [w for name, place in places.items() if place for w in (name, place.resolve())]
    different = 0
    for checkout in (REPO_ROOT, other.resolve()):
        words = [sys.executable, "-m", "niels_gpt", "data", "build", "--rebuild", *map(str, text)]
        run(checkout, words, Path())
    with tempfile.TemporaryDirectory() as temporary:
        for name, (config, settings, flag, kill) in RUNS.items():
            both = []
            for side, checkout in (("here", REPO_ROOT), ("there", other.resolve())):
                out = Path(temporary, name.replace(" ", "_"), side)
                words = command(config, settings, flag, "--out", out, *text)
                run(checkout, words, out, kill=kill)
                if kill:
                    run(checkout, [*words, "--resume", "latest"], out)
                both.append(fingerprints(out))
            different += both[0] != both[1]
            click.echo(f"{name}: {'the same' if both[0] == both[1] else 'DIFFERENT'}")
            for file in sorted({*both[0], *both[1]}):
                here, there = (side.get(file, "-")[:12] for side in both)
                click.echo(f"  {file:<18} {here}  {there}")
        whole, start = (Path(temporary, "with_dropout", side) for side in ("here", "there"))
        out = Path(temporary, "resumed_from_other")
        config, settings, flag, _ = RUNS["with dropout"]
        resume = [*text, "--resume", start / "step_0000020.pt", "--out", out]
        run(REPO_ROOT, command(config, settings, flag, *resume), out)
        same = fingerprints(whole)["latest.pt"] == fingerprints(out)["latest.pt"]
        different += not same
        click.echo(f"the other's step 20, resumed here: {'the same' if same else 'DIFFERENT'}")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
