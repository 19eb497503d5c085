"""The rows of the performance table: one function per figure, each measured in one run."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from benchmarks.sides import SIDES, Side, make_side
from benchmarks.timing import make_sgemm, median_seconds, sgemm_flops
from niels_gpt import evaluate, make_state
from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.model.flops import forward_flops, step_flops
from niels_gpt.paths import CONFIG_DIR

DEFAULT = ModelConfig()
SMALL = ModelConfig(L=4, H=4, C=128, T=64, d_ff=512, dropout=0.0)
LARGE = ModelConfig(L=8, H=8, C=512, T=512, d_ff=2048)


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
    """How long to measure."""

    rounds: int
    warmup: int


def default_step(effort: Effort) -> list[Figure]:
    """Speed of the default model against the plain loop, and the share of the floor."""
    return _compare("", DEFAULT, TrainConfig(), effort, Bars(best=1.5, floor=0.8))


def small_model(effort: Effort) -> list[Figure]:
    return _compare(", small", SMALL, TrainConfig(B=12), effort, Bars(eager=1.0, compiled=1.3))


def large_model(effort: Effort) -> list[Figure]:
    """Share of the floor that the large model reaches, eager and compiled."""
    cfg = TrainConfig(B=8)
    seconds = median_seconds(
        {
            "sgemm": make_sgemm(),
            "eager": make_side("niels_gpt", LARGE, cfg),
            "compiled": make_side("niels_gpt", LARGE, cfg, compiled=True),
        },
        rounds=effort.rounds,
        warmup=effort.warmup,
    )
    return [
        _share_of_floor(f"{name}, large", LARGE, cfg, seconds[name], seconds["sgemm"], bar=0.85)
        for name in ("eager", "compiled")
    ]


def dropout_cost(effort: Effort) -> list[Figure]:
    """Time that dropout 0.1 adds to a step, relative to the step without it."""
    cfg = TrainConfig()
    models = {"with": DEFAULT, "without": replace(DEFAULT, dropout=0.0)}
    figures = []
    for compiled in (False, True):
        sides = {n: make_side("niels_gpt", m, cfg, compiled=compiled) for n, m in models.items()}
        seconds = median_seconds(sides, rounds=effort.rounds, warmup=effort.warmup)
        cost = seconds["with"] / seconds["without"] - 1
        mode = "compiled" if compiled else "eager"
        figures.append(Figure(f"dropout cost, {mode}", cost, 0.12, False, seconds))
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
    batches = 4
    cfg = TrainConfig(eval_steps=batches)
    state = make_state(DEFAULT, cfg)
    stream = bytes(torch.randint(256, (1_000_000,), dtype=torch.uint8).tolist())
    seconds = median_seconds(
        {"sgemm": make_sgemm(), "evaluate": lambda: evaluate(state, stream, 1)},
        rounds=effort.rounds,
        warmup=effort.warmup,
    )
    flops = batches * forward_flops(DEFAULT, B=cfg.B)
    share = flops / (sgemm_flops() / seconds["sgemm"]) / seconds["evaluate"]
    return [Figure("evaluation against forward floor", share, 0.75, True, seconds)]


def start_up(effort: Effort) -> list[Figure]:
    """Seconds from the command to the first finished step of the quick config, warm caches."""
    figures = []
    for flag, bar in (("--no-compile", 5.0), ("--compile", 15.0)):
        _seconds_to_first_step(flag)  # warms the caches
        repeats = [_seconds_to_first_step(flag) for _ in range(max(3, effort.rounds // 3))]
        seconds = statistics.median(repeats)
        figures.append(
            Figure(f"start to first step, {flag}", seconds, bar, False, {"slowest": max(repeats)})
        )
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
        start_up,
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
    sides: dict[str, Side] = {
        f"{name} {mode}": make_side(name, model_cfg, cfg, compiled=mode == "compiled")
        for mode in ("eager", "compiled")
        for name in SIDES
    }
    seconds = median_seconds(
        {"sgemm": make_sgemm(), **sides}, rounds=effort.rounds, warmup=effort.warmup
    )
    plain, ours = (
        {mode: seconds[f"{name} {mode}"] for mode in ("eager", "compiled")} for name in SIDES
    )
    pairs = {
        **{mode: (plain[mode], ours[mode], getattr(bars, mode)) for mode in plain},
        "best": (min(plain.values()), min(ours.values()), bars.best),
    }
    return [
        *(
            Figure(
                f"{name} step{suffix}, against plain loop",
                a / b,
                bar,
                True,
                {"plain": a, "ours": b},
            )
            for name, (a, b, bar) in pairs.items()
        ),
        *(
            _share_of_floor(
                f"{mode}{suffix}",
                model_cfg,
                cfg,
                ours[mode],
                seconds["sgemm"],
                bar=bars.floor if mode == "compiled" else 0.0,
            )
            for mode in ours
        ),
    ]


def _share_of_floor(
    mode: str,
    model_cfg: ModelConfig,
    cfg: TrainConfig,
    seconds: float,
    sgemm_seconds: float,
    *,
    bar: float,
) -> Figure:
    rate = sgemm_flops() / sgemm_seconds
    floor = step_flops(model_cfg, B=cfg.B) / rate
    detail = {"seconds": seconds, "floor_seconds": floor, "sgemm_gflops": rate / 1e9}
    return Figure(f"{mode} step, share of the floor", floor / seconds, bar, True, detail)


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


def _seconds_to_first_step(flag: str) -> float:
    command = [sys.executable, "-m", "niels_gpt.train", "--config", "quick.json", flag]
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as out,
        subprocess.Popen([*command, "--out", out], stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step"):
                seconds = time.perf_counter() - started
                process.terminate()
                process.communicate()
                return seconds
    raise RuntimeError(f"{' '.join(command)} ended before its first step")
