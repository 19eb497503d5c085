"""The rows of the performance table: one function per figure, each measured in one run."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.sides import SAMPLED, SIDES, Side, make_side, side_of
from benchmarks.timing import make_sgemm, median_seconds, sgemm_flops
from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.model.flops import forward_flops, step_flops
from niels_gpt.paths import CONFIG_DIR, REPO_ROOT

DEFAULT = ModelConfig()
SMALL = ModelConfig(L=4, H=4, C=128, T=64, d_ff=512, dropout=0.0)
LARGE = ModelConfig(L=8, H=8, C=512, T=512, d_ff=2048)
MODES = {"eager": False, "compiled": True}  # the name of each, and whether it is compiled


class Figure(NamedTuple):
    """One measured figure with its bar, the target."""

    name: str
    value: float
    bar: float
    at_least: bool  # else the bar is an upper limit
    detail: dict[str, float]  # the underlying seconds, bytes, GFLOP/s

    @property
    def met(self) -> bool:
        return self.value >= self.bar if self.at_least else self.value <= self.bar


class Effort(NamedTuple):
    """How long to measure, and against what."""

    rounds: int
    warmup: int
    before: Path | None = None  # another checkout, whose sides take their turns


def default_step(effort: Effort) -> list[Figure]:
    """Speed of the default model against the plain loop, and the share of the floor."""
    return _compare("", DEFAULT, TrainConfig(), effort, Bars(best=1.5, floor=0.8))


def small_model(effort: Effort) -> list[Figure]:
    """Speed of the small model against the plain loop."""
    return _compare(", small", SMALL, TrainConfig(B=12), effort, Bars(eager=1.0, compiled=1.3))


def large_model(effort: Effort) -> list[Figure]:
    """Share of the floor that the large model reaches, eager and compiled."""
    cfg = TrainConfig(B=8)
    flops = step_flops(LARGE, B=cfg.B)
    jobs = {mode: Job("niels_gpt", LARGE, cfg, compiled) for mode, compiled in MODES.items()}
    seconds = _times(jobs, effort)
    return [
        _share(f"{mode}, large step, share of the floor{when}", flops, times, mode, bar=0.85)
        for when, times in by_checkout(seconds)
        for mode in MODES
    ]


def dropout_cost(effort: Effort) -> list[Figure]:
    """Time that dropout 0.1 adds to a step, relative to the step without it."""
    models = {"with": DEFAULT, "without": replace(DEFAULT, dropout=0.0)}
    figures = []
    for mode, compiled in MODES.items():
        jobs = {n: Job("niels_gpt", m, TrainConfig(), compiled) for n, m in models.items()}
        for when, seconds in by_checkout(_times(jobs, effort)):
            cost = seconds["with"] / seconds["without"] - 1
            figures.append(Figure(f"dropout cost, {mode}{when}", cost, 0.12, False, seconds))
    return figures


def memory(effort: Effort) -> list[Figure]:
    """Peak resident size relative to the plain loop's, and page faults per step."""
    config = str(CONFIG_DIR / "smoke.json")
    measured = {
        side: _child("memory", side, "--config", config, "--steps", str(effort.rounds))
        for side in SIDES
    }
    peaks = {side: values["peak_bytes"] for side, values in measured.items()}
    faults = {side: values["faults_per_step"] for side, values in measured.items()}
    ratio = peaks["niels_gpt"] / peaks["imperative"]
    return [
        Figure("peak memory against plain loop", ratio, 0.6, False, peaks),
        Figure("page faults per step", faults["niels_gpt"], 2000, False, faults),
    ]


def loop_overhead(effort: Effort) -> list[Figure]:
    """Time that the command adds between steps (batch, lr, checks, logging), relative to them."""
    config = str(CONFIG_DIR / "smoke.json")
    values = _child("loop", "--config", config, "--steps", str(effort.rounds))
    return [Figure("loop overhead", values["overhead"], 0.01, False, values)]


def evaluation(effort: Effort) -> list[Figure]:
    """Share of the forward floor that `evaluate` reaches."""
    cfg = TrainConfig(eval_steps=4)
    flops = cfg.eval_steps * forward_flops(DEFAULT, B=cfg.B)
    return [
        _share("evaluation against forward floor" + when, flops, seconds, "evaluate", bar=0.75)
        for when, seconds in by_checkout(
            _times({"evaluate": Job("evaluate", DEFAULT, cfg)}, effort)
        )
    ]


def sampling(effort: Effort) -> list[Figure]:
    """Bytes per second of `generate`, one text on one thread and 64 texts on all."""
    figures = []
    threads = torch.get_num_threads()
    for texts, used, bar in ((1, 1, 600), (64, threads, 8000)):
        torch.set_num_threads(used)
        jobs = {"sample": Job("sample", DEFAULT, TrainConfig(B=texts))}
        for when, seconds in by_checkout(_times(jobs, effort)):
            rate = texts * SAMPLED / seconds["sample"]
            name = f"bytes/s, {texts} at once, threads {used}{when}"
            figures.append(Figure(name, rate, bar, True, seconds))
    torch.set_num_threads(threads)
    return figures


def start_up(effort: Effort) -> list[Figure]:
    """Seconds from the command to the first finished step of the quick config, warm caches."""
    figures = []
    for flag, bar in (("--no-compile", 3.0), ("--compile", 15.0)):
        for when, checkout in _checkouts(effort):
            repeats = _starts("quick", flag, checkout, max(3, effort.rounds // 3))
            name = f"start to first step, {flag}{when}"
            detail = {"slowest": max(repeats)}
            figures.append(Figure(name, statistics.median(repeats), bar, False, detail))
    return figures


def compiling(effort: Effort) -> list[Figure]:
    """Seconds that compiling adds to the start of the smoke config: cold, then from the cache."""
    figures = []
    for when, checkout in _checkouts(effort):
        eager = statistics.median(_starts("smoke", "--no-compile", checkout, 3))
        with tempfile.TemporaryDirectory() as cache:
            environment = {"TORCHINDUCTOR_CACHE_DIR": cache}
            cold = _seconds_to_first_step("smoke", "--compile", checkout, environment)
            cached = statistics.median(_starts("smoke", "--compile", checkout, 3, environment))
        for name, seconds, bar in (("cold", cold, 25.0), ("from its cache", cached, 4.0)):
            detail = {"compiled": seconds, "eager": eager}
            figures.append(Figure(f"compiling, {name}{when}", seconds - eager, bar, False, detail))
    return figures


ROWS: dict[str, Callable[[Effort], list[Figure]]] = {
    row.__name__: row
    for row in (
        default_step,
        dropout_cost,
        memory,
        small_model,
        large_model,
        loop_overhead,
        evaluation,
        sampling,
        start_up,
        compiling,
    )
}


class Bars(NamedTuple):
    """How many times as fast as the plain loop our step is to be, and the share of the floor."""

    eager: float = 0.0
    compiled: float = 0.0
    best: float = 0.0  # the faster of our two against the faster of the plain loop's
    floor: float = 0.0  # compiled


def _compare(
    suffix: str, model_cfg: ModelConfig, cfg: TrainConfig, effort: Effort, bars: Bars
) -> list[Figure]:
    """Time both sides, eager and compiled, in turn: their ratios, and our shares of the floor."""
    jobs = {
        f"{name} {mode}": Job(name, model_cfg, cfg, compiled)
        for mode, compiled in MODES.items()
        for name in SIDES
    }
    figures = []
    for when, seconds in by_checkout(_times(jobs, effort)):
        plain, ours = ({mode: seconds[f"{name} {mode}"] for mode in MODES} for name in SIDES)
        pairs = {
            **{mode: (plain[mode], ours[mode], getattr(bars, mode)) for mode in MODES},
            "best": (min(plain.values()), min(ours.values()), bars.best),
        }
        for name, (a, b, bar) in pairs.items():
            title = f"{name} step{suffix}, against plain loop{when}"
            figures.append(Figure(title, a / b, bar, True, {"plain": a, "ours": b}))
        flops = step_flops(model_cfg, B=cfg.B)
        for mode in MODES:
            title, bar = f"{mode}{suffix} step, share of the floor{when}", bars.floor
            side = f"{SIDES[1]} {mode}"
            figures.append(_share(title, flops, seconds, side, bar if mode == "compiled" else 0))
    return figures


# --- what the rows share -----------------------------------------------------------------------


class Job(NamedTuple):
    """A side to time."""

    name: str  # of benchmarks.sides.MAKERS
    model_cfg: ModelConfig
    train_cfg: TrainConfig
    compiled: bool = False


BEFORE = "before: "


def _times(jobs: Mapping[str, Job], effort: Effort) -> dict[str, float]:
    """Return the median seconds of jobs done in turn: ours, and as BEFORE those of the other."""
    with ExitStack() as stack:
        sides: dict[str, Side] = {"sgemm": make_sgemm()}
        for name, job in jobs.items():
            sides[name] = make_side(*job)
            if effort.before and job.name != "imperative":
                sides[BEFORE + name] = stack.enter_context(side_of(effort.before, *job))
        return median_seconds(sides, rounds=effort.rounds, warmup=effort.warmup)


def by_checkout(seconds: Mapping[str, float]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the times of this checkout, then, if there is another, with its own in their place."""
    now = {name: value for name, value in seconds.items() if not name.startswith(BEFORE)}
    yield "", now
    before = {name: seconds[BEFORE + name] for name in now if BEFORE + name in seconds}
    if before:
        yield ", before", now | before


def _checkouts(effort: Effort) -> list[tuple[str, Path]]:
    return [("", REPO_ROOT), *([(", before", effort.before)] if effort.before else [])]


def _share(name: str, flops: int, seconds: Mapping[str, float], side: str, bar: float) -> Figure:
    """Return the share of the floor, which is these operations at the speed of sgemm."""
    rate = sgemm_flops() / seconds["sgemm"]
    floor = flops / rate
    detail = {"seconds": seconds[side], "floor_seconds": floor, "sgemm_gflops": rate / 1e9}
    return Figure(name, floor / seconds[side], bar, True, detail)


def _child(*args: str) -> dict[str, float]:
    """Run `benchmarks.child` and return the JSON object of its last line."""
    command = [
        *(sys.executable, "-W", "ignore", "-m", "benchmarks.child"),
        *("--threads", str(torch.get_num_threads())),
        *args,
    ]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    values: dict[str, Any] = json.loads(output.splitlines()[-1])
    return values


def _starts(
    config: str,
    flag: str,
    checkout: Path,
    repeats: int,
    environment: Mapping[str, str] | None = None,
) -> list[float]:
    """Return the seconds to the first step of so many starts, after one that fills the caches."""
    times = [
        _seconds_to_first_step(config, flag, checkout, environment) for _ in range(repeats + 1)
    ]
    return times[1:]


def _seconds_to_first_step(
    config: str, flag: str, checkout: Path, environment: Mapping[str, str] | None = None
) -> float:
    """Return the seconds from the command of a checkout to the line of its first step."""
    command = [sys.executable, "-m", "niels_gpt.train", "--config", config, flag]
    paths = {"PYTHONPATH": str(checkout), **(environment or {})}
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as out,
        subprocess.Popen(
            [*command, "--set", "train.log_every=1", "--out", out],
            cwd=checkout,
            env={**os.environ, **paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step"):
                seconds = time.perf_counter() - started
                process.terminate()
                process.communicate()
                return seconds
    raise RuntimeError(f"{' '.join(command)} ended before its first step")
