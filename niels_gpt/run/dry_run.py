"""The cost of a run, estimated from arithmetic and from a few measured steps.

Nothing is written, and the plan's state is unchanged: a step returns a new one.
"""

import math
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from niels_gpt.checkpoint import checkpoint_of, checkpoint_size
from niels_gpt.config import TrainConfig
from niels_gpt.device import BUSY, available_memory, is_busy, metal_memory
from niels_gpt.eval import evaluate
from niels_gpt.files.names import BEST, LATEST
from niels_gpt.model.flops import parameter_count, step_flops
from niels_gpt.run.compile import choose_step
from niels_gpt.run.folder import files_of_another_run
from niels_gpt.run.plan import Plan
from niels_gpt.state import TrainState
from niels_gpt.step import StepFunction, loop_step
from niels_gpt.units import duration, size

TIMED_STEPS = 2


def estimate(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """Return the sources and the cost of the run, as a value and as lines of text."""
    messages = [*plan.messages, *([BUSY] if is_busy() else [])]
    cost = costs(plan)
    value = {"messages": messages, "sources": plan.corpus.record, **cost}
    return value, [*_source_lines(messages, plan), *_cost_lines(cost)]


def costs(plan: Plan) -> dict[str, Any]:
    """Return the cost of a run as numbers: counts, bytes, seconds.

    Takes three steps, the first untimed because it includes one-time costs, and evaluates one
    batch. `memory_bytes` is this process's peak so far plus a checkpoint being saved, plus what
    Metal holds, which is main memory too; of another GPU's memory it knows nothing.
    """
    cfg, model_cfg = plan.state.train_cfg, plan.state.model_cfg
    state, seconds_per_step = _time_steps(plan)
    seconds_per_eval = cfg.eval_steps * _seconds(lambda: _evaluate_once(plan))
    steps = max(0, cfg.total_steps - plan.state.step)
    evals = _evaluations(cfg, plan.state.step)
    others = len(plan.corpus.val) - 1 if evals else 0  # each is scored once, at the end
    size = checkpoint_bytes(plan, state)
    files = new_files(plan)
    return {
        "parameters": parameter_count(model_cfg),
        "flops_per_step": step_flops(model_cfg, B=cfg.B),
        "text_bytes_per_step": cfg.B * model_cfg.T,
        "steps": steps,
        "evaluations": evals,
        "other_texts": others,
        "seconds_per_step": seconds_per_step,
        "seconds_per_evaluation": seconds_per_eval,
        "seconds": steps * seconds_per_step + (evals + others) * seconds_per_eval,
        "memory_bytes": peak_memory_bytes() + metal_memory() + size,
        "memory_here_bytes": available_memory(),
        "checkpoint_bytes": size,
        "checkpoint_files": files,
        "disk_bytes": (files + 1) * size,  # a new file is complete before it replaces the old one
        "disk_free_bytes": shutil.disk_usage(_nearest_folder(plan.out)).free,
    }


def checkpoint_bytes(plan: Plan, state: TrainState) -> int:
    """Return the size of a checkpoint of this run."""
    scores = plan.scores._replace(best_val_loss=math.e)
    record, environment = plan.corpus.record, plan.environment
    return checkpoint_size(checkpoint_of(state, scores, record, environment, plan.ancestors))


def new_files(plan: Plan) -> int:
    """Count the checkpoints that the run will add to its folder."""
    cfg = plan.state.train_cfg
    periodic = cfg.total_steps // cfg.ckpt_every - plan.state.step // cfg.ckpt_every
    there = [plan.out / LATEST, plan.out / BEST] if plan.out.is_dir() else []
    moved = files_of_another_run(plan) if there else []
    return periodic + 2 - sum(path.exists() and path not in moved for path in there)


def peak_memory_bytes() -> int:
    """Return this process's peak use of main memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def _time_steps(plan: Plan) -> tuple[TrainState, float]:
    """Take the next steps of the run; return a state with moments, and seconds per step."""
    state, device = plan.state, plan.environment["device"]
    train_on = _step_function(plan)

    def step() -> None:
        nonlocal state
        state, metrics = train_on(
            state, plan.corpus.batch(state.step, device), state.train_cfg.base_lr
        )
        metrics["loss"].item()  # waits for the device

    step()
    return state, sum(_seconds(step) for _ in range(TIMED_STEPS)) / TIMED_STEPS


def _step_function(plan: Plan) -> StepFunction:
    if not plan.environment["compile"]:
        return loop_step
    batch = plan.corpus.batch(plan.state.step, plan.environment["device"])
    return choose_step(plan.state, batch, lambda line: None)[0]


def _evaluate_once(plan: Plan) -> None:
    one_batch = plan.state._replace(train_cfg=replace(plan.state.train_cfg, eval_steps=1))
    evaluate(one_batch, plan.corpus.validation, one_batch.train_cfg.seed)


def _seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _evaluations(cfg: TrainConfig, done: int) -> int:
    """Count the evaluations after update `done`: every `eval_every` updates, and the last."""
    if done >= cfg.total_steps:
        return 0
    extra_at_the_end = cfg.total_steps % cfg.eval_every != 0
    return cfg.total_steps // cfg.eval_every - done // cfg.eval_every + extra_at_the_end


def _nearest_folder(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


# --- as text -----------------------------------------------------------------------------------


def _source_lines(messages: list[str], plan: Plan) -> list[str]:
    lines = [f"note: {message}" for message in messages]
    for split, infos in plan.corpus.sources.items():
        lines += [f"{f'{split}/{name}':<14}{info}" for name, info in infos.items()]
    return lines


def _cost_lines(c: dict[str, Any]) -> list[str]:
    gflops = c["flops_per_step"] / 1e9
    steps, evals, others = c["steps"] * c["seconds_per_step"], c["evaluations"], c["other_texts"]
    scoring = (evals + others) * c["seconds_per_evaluation"]
    return [
        f"{'parameters':<14}{c['parameters']:,}",
        f"{'one step':<14}{c['text_bytes_per_step']:,} bytes of text, {gflops:,.1f} GFLOP, "
        f"{c['seconds_per_step']:.3g} s here ({gflops / c['seconds_per_step']:,.0f} GFLOP/s)",
        f"{'time':<14}about {duration(c['seconds'])}: {c['steps']:,} steps {duration(steps)}, "
        f"{evals:,} evaluations{f' and {others} more of other texts' * bool(others)} "
        f"{duration(scoring)}",
        f"{'memory':<14}about {size(c['memory_bytes'])} of the {size(c['memory_here_bytes'])} here",
        f"{'disk':<14}{size(c['checkpoint_bytes'])} a checkpoint, {c['checkpoint_files']:,} files "
        f"and one being written: {size(c['disk_bytes'])} of the {size(c['disk_free_bytes'])} free",
        *(
            f"warning: not enough {what}"
            for what, need, have in (
                ("memory", c["memory_bytes"], c["memory_here_bytes"]),
                ("free disk space", c["disk_bytes"], c["disk_free_bytes"]),
            )
            if need > have
        ),
        "dry run: nothing was written",
    ]
