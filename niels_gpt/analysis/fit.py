"""The run for a given time: what this machine does in it, and what the scaling law makes of that.

The cost of a step of B rows is rows times seconds a row, and seconds for the optimizer. Both are
measured for a few widths and interpolated between them, per operation.
"""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

from niels_gpt.analysis import scaling
from niels_gpt.analysis.scaling import SHAPES, Expected, Text, distinct_bytes, matrix_count
from niels_gpt.config import ModelConfig, TrainConfig, to_dict
from niels_gpt.corpus import Corpus
from niels_gpt.model.flops import parameter_count, step_flops
from niels_gpt.run.plan import COMPILE_FLOPS, choose_compile
from niels_gpt.state import make_state
from niels_gpt.step import loop_step
from niels_gpt.units import duration, size

Clock = Callable[[], float]

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
LONGEST = 366 * UNITS["d"]
START_SECONDS = 6.0  # to start, to read the text and to save the last checkpoint
STEPS_SHARE = 0.92  # of the rest; evaluations take 4 %, saving, logging and chance the others
COMPILE_SECONDS = 40.0  # before the first step of a run that `train` compiles
COMPILED = 7 / 8  # of the time of an eager step
EVALUATED = 0.12  # bytes evaluated for each byte trained on; a third of the cost of training
EVALUATIONS = 10  # in a run
FEWEST_STEPS = 256  # of a run; shorter ones leave the choice of the network to chance
MEASURED = ((64, 2), (128, 3), (256, 4), (384, 6))  # width and depth
MEASURE_SECONDS = 40.0  # after which no further width is measured
ROWS = (8, 16)  # of the measured steps
BATCHES = {8: FEWEST_STEPS, 16: 2000, 32: 8000}  # rows: the fewest steps to take with them
WORTH = 0.75  # of its bytes: text that is worth less is too small for the time
REPEATED = 4  # times; up to here repeated text is nearly as good as new (Muennighoff)


class Cost(NamedTuple):
    """What steps of one width cost on this machine."""

    C: int
    row: float  # seconds per operation of the gradient of a row
    update: float  # seconds per operation of an update, counted as width times parameters


class Choice(NamedTuple):
    """A run that fits into the time."""

    model_cfg: ModelConfig
    B: int
    steps: int
    expected: Expected

    @property
    def nbytes(self) -> int:
        """Return the bytes trained on."""
        return self.B * self.model_cfg.T * self.steps


def parse_time(text: str) -> float:
    """Return the seconds of "90s", "20m", "8h" or "1.5h".

    Raises:
        ValueError: for anything else, and for nothing or more than a year.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)([smhd])", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a time such as 90s, 20m or 8h")
    seconds = float(match[1]) * UNITS[match[2]]
    if not 0 < seconds <= LONGEST:
        raise ValueError(f"{text!r} must be more than nothing and at most a year")
    return seconds


# --- what this machine does --------------------------------------------------------------------


def measure(corpus: Corpus, device: str, clock: Clock = time.perf_counter) -> list[Cost]:
    """Time real steps of a few widths; the larger ones are left out on a slow machine."""
    started, costs = clock(), list[Cost]()
    for C, L in MEASURED:
        if (
            costs and clock() - started > MEASURE_SECONDS / 4
        ):  # the next takes up to 3 times as long
            break
        costs.append(_cost_of(scaling.model_config(C, L, corpus.T), corpus, device, clock))
    return costs


def _cost_of(cfg: ModelConfig, corpus: Corpus, device: str, clock: Clock) -> Cost:
    few, many = (_seconds_of_step(cfg, corpus, B, device, clock) for B in ROWS)
    row = min(max((many - few) / (ROWS[1] - ROWS[0]), many / ROWS[1] / 2), few / ROWS[0])
    update = max(few - row * ROWS[0], 0.0)
    return Cost(cfg.C, row / step_flops(cfg, B=1), update / update_work(cfg))


def _seconds_of_step(cfg: ModelConfig, corpus: Corpus, B: int, device: str, clock: Clock) -> float:
    """Return the seconds of the faster of two steps after a first."""
    state = make_state(cfg, scaling.train_config(B, 10, 1e-3, corpus.p), device)
    text, seconds = replace(corpus, B=B), []
    for k in range(3):
        started = clock()
        state, metrics = loop_step(state, text.batch(k, device), 1e-3)
        metrics["loss"].item()  # waits for the device
        seconds.append(clock() - started)
    return min(seconds[1:])


def update_work(cfg: ModelConfig) -> int:
    """Return a measure of the operations of Muon's products, which grow as C times parameters."""
    return cfg.C * matrix_count(cfg)


def step_seconds(cfg: ModelConfig, B: int, costs: Sequence[Cost]) -> float:
    """Return the expected seconds of a step."""
    row = _between(cfg.C, [(c.C, c.row) for c in costs])
    update = _between(cfg.C, [(c.C, c.update) for c in costs])
    return row * step_flops(cfg, B=B) + update * update_work(cfg)


def _between(C: int, points: Sequence[tuple[int, float]]) -> float:
    """Interpolate linearly in log C; beyond the ends the nearest value holds."""
    for (left, a), (right, b) in pairwise(points):
        if left <= C <= right:
            return a + (b - a) * math.log(C / left) / math.log(right / left)
    return points[0][1] if points[0][0] > C else points[-1][1]


# --- the choice --------------------------------------------------------------------------------


def choose(
    seconds: float, costs: Sequence[Cost], texts: Mapping[str, Text], T: int, *, compiles: bool
) -> list[Choice]:
    """Return the best run of each size that fits into the time, the least expected loss first.

    Raises:
        ValueError: if the time is too short for any.
    """
    runs = [
        run
        for cfg in sizes_for(texts, T)
        if (run := _best_of(cfg, seconds, costs, texts, compiles))
    ]
    if not runs:
        cfg = scaling.model_config(*SHAPES[0], T)
        needed = START_SECONDS + FEWEST_STEPS * step_seconds(cfg, ROWS[0], costs) / STEPS_SHARE
        raise ValueError(
            f"too short for anything: in {seconds:.3g} s this machine cannot take {FEWEST_STEPS} "
            f"steps of the smallest network; give it at least {math.ceil(needed)}s"
        )
    return sorted(runs, key=lambda run: run.expected.nats)


def sizes_for(texts: Mapping[str, Text], T: int) -> list[ModelConfig]:
    """Return the networks to choose from: at most one parameter for each distinct byte."""
    bound = sum(text.nbytes for text in texts.values())
    networks = [scaling.model_config(C, L, T) for C, L in SHAPES]
    return [cfg for i, cfg in enumerate(networks) if i == 0 or matrix_count(cfg) <= bound]


def _best_of(
    cfg: ModelConfig,
    seconds: float,
    costs: Sequence[Cost],
    texts: Mapping[str, Text],
    compiles: bool,
) -> Choice | None:
    """Return the run of a network with the most bytes, None if the time is too short for it."""
    runs = [
        (steps * B, B, steps)
        for B, fewest in BATCHES.items()
        if (steps := _steps_within(seconds, cfg, B, costs, compiles)) >= fewest
    ]
    if not runs:
        return None
    _, B, steps = max(runs)
    return Choice(cfg, B, steps, scaling.expect(cfg, steps * B * cfg.T, texts))


def _steps_within(
    seconds: float, cfg: ModelConfig, B: int, costs: Sequence[Cost], compiles: bool
) -> int:
    """Return how many steps fit; a run of `COMPILE_FLOPS` operations or more is compiled."""
    each = step_seconds(cfg, B, costs)
    left = (seconds - START_SECONDS) * STEPS_SHARE
    eager = int(max(0.0, left) / each)
    if not compiles:
        return eager
    compiled = int(max(0.0, left - COMPILE_SECONDS) / (each * COMPILED))
    enough = math.ceil(COMPILE_FLOPS / step_flops(cfg, B=B))
    return max(min(eager, enough - 1), compiled if compiled >= enough else 0)


def config_of(choice: Choice, p_train: Mapping[str, float]) -> TrainConfig:
    """Return the schedule of a run, with evaluations that cost 4 % of it."""
    B, steps = choice.B, choice.steps
    lr = scaling.base_lr(choice.model_cfg.C)
    cfg = scaling.train_config(B, steps, lr, p_train)
    evaluations = min(EVALUATIONS, steps)
    return replace(
        cfg,
        eval_every=math.ceil(steps / evaluations),
        eval_steps=min(100, max(1, int(EVALUATED * steps / evaluations))),
        log_every=max(1, steps // 100),
        ckpt_every=math.ceil(steps / 4),
    )


# --- the report --------------------------------------------------------------------------------


class Fit(NamedTuple):
    """A config for a time, and what speaks for it."""

    config: dict[str, Any]  # as a file has it
    expected: Expected
    reasons: dict[str, str]  # by what was chosen
    warnings: list[str]


def fit(seconds: float, corpus: Corpus, device: str, costs: Sequence[Cost]) -> Fit:
    """Return the config for a time on this machine and this text, with the reason of each choice.

    Raises:
        ValueError: if the time is too short for any.
    """
    texts = {name: Text(corpus.p[name], len(text)) for name, text in corpus.train.items()}
    choices = choose(seconds, costs, texts, corpus.T, compiles=compiles_long_runs(device))
    best = choices[0]
    cfg = replace(config_of(best, corpus.p), val_source=corpus.val_source)
    return Fit(
        {"model": to_dict(best.model_cfg), "train": to_dict(cfg)},
        best.expected,
        {
            **_reasons_of_time(seconds, costs),
            **_reasons_of_run(choices, texts),
            **_reasons_of_schedule(cfg, best),
        },
        warnings_of(best, texts),
    )


def compiles_long_runs(device: str) -> bool:
    """Return whether `train` compiles the step of a long run here."""
    return choose_compile(None, None, device, ModelConfig(), TrainConfig(total_steps=10**9))[0]


def _reasons_of_time(seconds: float, costs: Sequence[Cost]) -> dict[str, str]:
    speeds = ", ".join(f"{1e-9 / cost.row:,.0f} at C={cost.C}" for cost in costs)
    left = duration(max(0.0, seconds - START_SECONDS) * STEPS_SHARE)
    return {
        "speed": f"{speeds} (GFLOP/s of the gradient, measured now)",
        "time": f"{duration(seconds)}: {START_SECONDS:g} s to start, {1 - STEPS_SHARE:.0%} of the "
        f"rest to evaluate and save, {left} of steps",
    }


def _reasons_of_run(choices: Sequence[Choice], texts: Mapping[str, Text]) -> dict[str, str]:
    best, others = choices[0], _beside(choices)
    model, losses = (
        best.model_cfg,
        ", ".join(f"C={c.model_cfg.C} {c.expected.nats:.3f}" for c in others),
    )
    read = ", ".join(f"{name} {readings(best, text):.2g}" for name, text in texts.items())
    larger = len(sizes_for(texts, model.T)) < len(SHAPES)
    bound = "; larger ones have more parameters than the text has bytes" * larger
    return {
        "network": f"C={model.C}, L={model.L}, H={model.H}: {parameter_count(model):,} parameters; "
        f"the least expected loss of {len(choices)} sizes" + f" ({losses})" * bool(others) + bound,
        "batch": f"{best.B} rows of {model.T} bytes; larger only once there are "
        f"{BATCHES[16]:,} steps: small runs gain more from many updates than from large ones",
        "steps": f"{best.steps:,}: {size(best.nbytes)}; times that each source is read: {read}",
    }


def _reasons_of_schedule(cfg: TrainConfig, best: Choice) -> dict[str, str]:
    nats, low, high = best.expected
    return {
        "lr": f"{cfg.base_lr:g}, then in a straight line to 0; the rate of the law's runs, "
        f"{scaling.LR:g} at C={scaling.LR_WIDTH}, falling as C^-{scaling.LR_FALL:g}",
        "warmup": f"{cfg.warmup_steps:,} steps, a tenth",
        "loss": f"{nats:.2f} nats per byte ({nats / math.log(2):.2f} bits) on Wikipedia, "
        f"between {low:.2f} and {high:.2f}",
    }


def _beside(choices: Sequence[Choice]) -> list[Choice]:
    """Return the choices with the next smaller and the next larger network than the first."""
    by_size = sorted(choices, key=lambda choice: choice.model_cfg.C)
    i = by_size.index(choices[0])
    return by_size[max(0, i - 1) : i] + by_size[i + 1 : i + 2]


def readings(choice: Choice, text: Text) -> float:
    """Return how many times a run reads a source."""
    return choice.nbytes * text.share / text.nbytes


def warnings_of(choice: Choice, texts: Mapping[str, Text]) -> list[str]:
    """Return what the user should know of the text and of the law."""
    D, U = choice.nbytes, sum(text.nbytes for text in texts.values())
    warnings = scaling.beyond_the_runs(choice.model_cfg, D, choice.steps)
    if distinct_bytes(D, texts) < WORTH * D:
        endless = {name: text._replace(nbytes=D) for name, text in texts.items()}
        nats = scaling.expect(choice.model_cfg, D, endless).nats
        warnings.append(
            f"the text is too small for this time: the run reads {size(D)} of {size(U)}; "
            f"with enough text the expected loss is {nats:.2f}"
        )
    if "wiki" not in texts:
        warnings.append("the law was measured on Wikipedia and notes; other text differs")
    return warnings
