"""The runs of the scaling law, and its fit.

    python -m benchmarks.scaling --wiki DIR --roam DIR      # 90 minutes on one thread
    python -m benchmarks.scaling --fit                      # of the runs so far

Each run is a whole schedule, from a new network to a rate of 0. Its result is a line of
`docs/runs/scaling.jsonl`; a run that is there is not run again, so the command can be stopped and
started at will.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

from niels_gpt.analysis.scaling import (
    SHORTEST,
    Law,
    Text,
    base_lr,
    distinct_bytes,
    matrix_count,
    model_config,
    train_config,
)
from niels_gpt.config import default_p_train
from niels_gpt.corpus import Corpus, advance, open_corpus
from niels_gpt.data.sources import Given
from niels_gpt.device import keep_freed_memory
from niels_gpt.eval import evaluate
from niels_gpt.model.flops import step_flops
from niels_gpt.rng import keyed_generator
from niels_gpt.state import TrainState, make_state
from niels_gpt.streams import locate

RUNS = Path(__file__).parent.parent / "docs" / "runs" / "scaling.jsonl"
T = 256
EVAL: dict[str, Any] = {"B": 32, "eval_steps": 16}  # the same 512 rows of wiki/val for every run
EVAL_SEED = 42
STARTS = ((0.2, 0.4, 1.0, 0.4), (0.9, 0.1, 0.3, 0.9))  # of the search: A, a, B, b
ES = (1.0, 0.8, 1.1)  # assumed, see docs/results.md; the first is the law's
DRAWS = 12  # of the bootstrap
ROWS = 8  # of a batch
HUBER = 1e-3  # of the residuals of log L, as Hoffmann et al.

Record = dict[str, Any]


class Run(NamedTuple):
    """A run of the law."""

    C: int
    L: int
    steps: int
    lr: float
    B: int = ROWS
    seed: int = 42
    unique: int | None = None  # bytes of text, all sources together; None: all there is

    @property
    def bytes(self) -> int:
        """Return the bytes trained on."""
        return self.steps * self.B * T


def rates() -> list[Run]:
    """Return the runs that the rule for the rate comes from."""
    narrow = [Run(64, 2, 128, lr) for lr in (0.006, 0.012, 0.024, 0.048)]
    wide = [Run(128, 3, 128, lr) for lr in (0.006, 0.012, 0.024)]
    batch = [Run(64, 2, 64, lr, B=32) for lr in (0.012, 0.024, 0.048)]
    return [*narrow, *wide, *batch, Run(32, 2, 1024, 0.024)]


def grid() -> list[Run]:
    """Return the runs of the law: six sizes with several budgets each, and repeated text.

    The smallest size has five seeds at two budgets. What tells most of the law comes first.
    """

    def run(C: int, L: int, quarters: int, **more: int) -> Run:
        """Return a run over so many quarters of a MiB."""
        return Run(C, L, 128 * quarters, base_lr(C), **more)

    budgets = {(32, 2): (1, 2, 4, 8, 16), (64, 2): (1, 2, 4, 8, 16, 32, 64)}
    larger = {(96, 3): (1, 2, 4, 8, 16, 32), (128, 3): (1, 2, 4, 8, 16), (192, 4): (2, 4, 8)}
    largest = {(256, 4): (4, 8)}
    fresh = [
        run(C, L, n)
        for (C, L), several in {**budgets, **larger, **largest}.items()
        for n in several
    ]
    seeds = [run(32, 2, n, seed=seed) for n in (1, 4) for seed in (43, 44, 45, 46)]
    sizes = ((32, 2, 2**16), (64, 2, 2**16), (64, 2, 2**18), (96, 3, 2**17))
    again = [run(C, L, 4, unique=unique) for C, L, unique in sizes]
    first = [run for run in fresh if run.steps >= SHORTEST and cost(run) < 5e12]
    return list(dict.fromkeys([*sorted(first, key=cost), *seeds, *again, *sorted(fresh, key=cost)]))


def cost(run: Run) -> int:
    """Return the operations of a run."""
    return run.steps * step_flops(model_config(run.C, run.L, T), B=run.B)


# --- a run -------------------------------------------------------------------------------------


def carry_out(run: Run, corpus: Corpus) -> Record:
    """Train and evaluate; return the line of the result."""
    model_cfg = model_config(run.C, run.L, T)
    cfg = replace(train_config(run.B, run.steps, run.lr, corpus.p), seed=run.seed)
    text = replace(shortened(corpus, run.unique), seed=run.seed, B=run.B)
    state, started = make_state(model_cfg, cfg), time.process_time()
    for _ in range(run.steps):
        state, _ = advance(state, text)
    return {
        **run._asdict(),
        "N": matrix_count(model_cfg),
        "bytes": run.bytes,
        "flops": cost(run),
        "text": texts_of(text),
        "val_nats": round(validation_loss(state, corpus.val["wiki"]), 5),
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def validation_loss(state: TrainState, wiki: bytes) -> float:
    """Return the loss on rows that are the same for every run, in nats per byte."""
    cfg = replace(state.train_cfg, **EVAL)
    return evaluate(state._replace(train_cfg=cfg), wiki, EVAL_SEED)


def shortened(corpus: Corpus, unique: int | None) -> Corpus:
    """Return a corpus with the starts of its sources, so that all are read equally often."""
    if unique is None:
        return corpus
    starts = {name: text[: round(unique * corpus.p[name])] for name, text in corpus.train.items()}
    return replace(corpus, train=starts)


def texts_of(corpus: Corpus) -> dict[str, Text]:
    """Return the sources of a corpus as the law knows them."""
    return {name: Text(corpus.p[name], len(text)) for name, text in corpus.train.items()}


def missing(runs: Iterable[Run], records: Iterable[Record]) -> list[Run]:
    """Return the runs that have no record yet."""
    done = {Run(*(record[field] for field in Run._fields)) for record in records}
    return [run for run in dict.fromkeys(runs) if run not in done]


def read_runs(path: Path = RUNS) -> list[Record]:
    """Return the records of a file, none if it is absent."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- the fit -----------------------------------------------------------------------------------


class Point(NamedTuple):
    """What the law sees of a run."""

    N: float  # parameters outside the embedding
    D: float  # bytes
    nats: float


def points_of(records: Iterable[Record]) -> list[Point]:
    """Return the runs that the law is fitted to: long enough, over text that did not repeat.

    Of several rates the best counts; seeds count each.
    """
    best: dict[tuple[Any, ...], Point] = {}
    for r in records:
        if r["B"] == ROWS and r["steps"] >= SHORTEST and r["unique"] is None:
            point, key = Point(r["N"], r["bytes"], r["val_nats"]), (r["C"], r["steps"], r["seed"])
            best[key] = min(point, best.get(key, point), key=lambda p: p.nats)
    return list(best.values())


def fit(points: Sequence[Point], E: float) -> Law:
    """Return the law with this E and the least Huber loss of the differences of log L.

    The loss has several minima; the best of the searches from `STARTS` counts.
    """
    N, D, nats = torch.tensor(points, dtype=torch.float64).T

    def error(theta: Tensor) -> Tensor:
        A, a, B, b = theta.exp()
        found = E + A * (N / 1e6) ** -a + B * (D / 1e6) ** -b
        return 1e3 * torch.nn.functional.huber_loss(found.log(), nats.log(), delta=HUBER)

    ends = [_minimum(error, torch.tensor(start, dtype=torch.float64).log()) for start in STARTS]
    return Law(E, *min(ends, key=lambda theta: error(theta).item()).exp().tolist())


def _minimum(error: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Return the minimum that L-BFGS finds from a start."""
    theta = start.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=1000,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = error(theta)
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return theta.detach()


def bootstrap(points: Sequence[Point], n: int, seed: int = 42) -> list[Law]:
    """Return the laws of n draws of as many points, with replacement, each with one of the ES."""
    laws = []
    for k in range(n):
        generator = keyed_generator(seed, "bootstrap", k)
        drawn = torch.randint(len(points), (len(points),), generator=generator).tolist()
        laws.append(fit([points[i] for i in drawn], ES[k % len(ES)]))
    return laws


def fit_repeats(records: Iterable[Record], law: Law) -> float:
    """Return the R* (in tenths) that explains best the runs over repeated text.

    Of networks without more parameters than the text has bytes: `config fit` chooses no others.
    """
    again = [r for r in records if r["unique"] is not None and r["N"] <= r["unique"]]

    def error(repeats: float) -> float:
        return sum(abs(float(r["val_nats"]) - _again(r, law, repeats)) for r in again)

    return min((tenths / 10 for tenths in range(5, 301)), key=error)


def _again(r: Record, law: Law, repeats: float) -> float:
    """Return the loss that the law gives a run over repeated text."""
    texts = {name: Text(*text) for name, text in r["text"].items()}
    return law.loss(float(r["N"]), distinct_bytes(r["bytes"], texts, repeats))


# --- the command -------------------------------------------------------------------------------


@click.command()
@click.option("--wiki", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--roam", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RUNS)
@click.option("--only", type=click.Choice(["rates"]), help="Only these runs.")
@click.option("--fit", "only_fit", is_flag=True, help="Run nothing; fit what is there.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
def main(
    wiki: Path | None,
    roam: Path | None,
    out: Path,
    only: str | None,
    only_fit: bool,
    threads: int,
) -> None:
    """Run what is missing and print the law."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    if not only_fit:
        places = {name: place for name, place in {"wiki": wiki, "roam": roam}.items() if place}
        run_all(rates() if only else [*rates(), *grid()], places, out, click.echo)
    click.echo("\n".join(report(read_runs(out))))


def report(records: Sequence[Record]) -> list[str]:
    """Return the constants as niels_gpt.analysis.scaling has them, and what they leave."""
    points = points_of(records)
    law, *drawn = (rounded(found) for found in (fit(points, ES[0]), *bootstrap(points, DRAWS)))
    errors = [abs(law.loss(point.N, point.D) - point.nats) for point in points]
    return [
        f"LAW = {law}",
        *(f"    {found}," for found in drawn),
        f"REPEATS = {fit_repeats(records, law)}",
        f"{len(points)} runs, mean difference {sum(errors) / len(errors):.4f} nats:",
        *(f"N {p.N:>9,} D {p.D:>9,} {p.nats:.4f} {law.loss(p.N, p.D):.4f}" for p in points),
    ]


def rounded(law: Law) -> Law:
    """Return a law with four digits of each constant."""
    return Law(*(float(f"{constant:.4g}") for constant in law))


def run_all(
    runs: Sequence[Run], places: Mapping[str, Path], out: Path, say: Callable[[str], object]
) -> None:
    """Carry out each run that the file lacks, and append its line."""
    cfg = train_config(8, 1, 0.01, default_p_train())
    corpus = open_corpus(model_config(32, 1, T), cfg, locate(Given(places)))
    for run in missing(runs, read_runs(out)):
        line = json.dumps(carry_out(run, corpus))
        with out.open("a", encoding="utf-8") as file:
            print(line, file=file, flush=True)
        say(line)


if __name__ == "__main__":
    main()
