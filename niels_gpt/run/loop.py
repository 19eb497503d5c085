"""The training loop: a fold of the step over a counter, with all I/O passed in.

Order of duties after update k: log; if an evaluation is due, save `latest.pt`, evaluate, and save
again with the result (`best.pt` if it is the best yet, `step_*.pt` if due, `latest.pt` last). A
killed evaluation thus loses nothing, and `best.pt` is never behind `latest.pt`.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from niels_gpt.eval import Scores
from niels_gpt.files.names import BEST, LATEST, step_name
from niels_gpt.loss import Batch
from niels_gpt.run.stop import Stopped
from niels_gpt.state import TrainState


class NonFiniteError(ArithmeticError):
    """A loss or gradient norm is NaN or infinite; the message names the step."""


@dataclass(frozen=True)
class Ports:
    """The loop's connections to the outside world. Steps count finished updates."""

    batch: Callable[[int], Batch]  # of the update after this many
    lr: Callable[[int], float]
    step: Callable[[TrainState, Batch, float], tuple[TrainState, dict[str, Tensor]]]
    evaluate: Callable[[TrainState], float]
    on_step: Callable[
        [int, float, dict[str, Tensor]], None
    ]  # after every update: step, lr, metrics
    on_log: Callable[[int, float, dict[str, float]], None]
    on_eval: Callable[[int, Scores], None]
    save: Callable[[Sequence[str], TrainState, Scores], bool]  # False: not saved, and reported
    check_stop: Callable[[], None]
    may_stop: Callable[[], AbstractContextManager[None]]  # a signal may interrupt the code inside
    check_each: bool  # check the loss of every step before adopting its state
    show: Callable[[TrainState], None] = lambda state: None  # after an evaluation, once it is saved


def run(state: TrainState, scores: Scores, ports: Ports) -> tuple[TrainState, Scores, bool]:
    """Train to the config's `total_steps`; return the state, the scores, and whether it is saved.

    It ends with a save also where there was nothing left to do: the state may be another folder's.

    Raises:
        NonFiniteError: if a loss or gradient norm is not finite; that step is not saved.
        Stopped: after a signal, with the state saved as `latest.pt`.
    """
    cfg = state.train_cfg
    saved = False
    try:
        if state.step and evaluation_due(state) and not _is_evaluated(state, scores):
            scores, saved = _evaluate(state, scores, ports)
            ports.show(state)
        while state.step < cfg.total_steps:
            ports.check_stop()
            lr = ports.lr(state.step)
            new_state, metrics = ports.step(state, ports.batch(state.step), lr)
            if ports.check_each:
                check_finite(new_state.step, metrics)
            state, saved = new_state, False
            ports.on_step(state.step, lr, metrics)
            if _log_due(state):
                ports.on_log(state.step, lr, check_finite(state.step, metrics))
            if evaluation_due(state):
                check_finite(state.step, metrics)
                saved = ports.save([LATEST], state, scores)
                scores, saved = _evaluate(state, scores, ports)
                ports.show(state)
            elif state.step % cfg.ckpt_every == 0:
                check_finite(state.step, metrics)
                saved = ports.save([step_name(state.step), LATEST], state, scores)
    except Stopped:
        if not saved:
            ports.save([LATEST], state, scores)
        raise
    return state, scores, saved or ports.save([LATEST], state, scores)


def _evaluate(state: TrainState, scores: Scores, ports: Ports) -> tuple[Scores, bool]:
    with ports.may_stop():
        val_loss = ports.evaluate(state)
    if not math.isfinite(val_loss):
        raise NonFiniteError(f"the validation loss after step {state.step} is {val_loss}")
    scores = scores.updated(state.step, val_loss)
    ports.on_eval(state.step, scores)
    names = [BEST] if scores.best_step == state.step else []
    if state.step % state.train_cfg.ckpt_every == 0:
        names.append(step_name(state.step))
    return scores, ports.save([*names, LATEST], state, scores)


def evaluation_due(state: TrainState) -> bool:
    """Return whether to evaluate this state: every `eval_every` updates, and after the last."""
    cfg = state.train_cfg
    return state.step % cfg.eval_every == 0 or state.step == cfg.total_steps


def _is_evaluated(state: TrainState, scores: Scores) -> bool:
    """Return whether the scores hold the validation loss of this state, on the text of the run."""
    return scores.val_loss is not None and scores.val_step == state.step


def _log_due(state: TrainState) -> bool:
    cfg = state.train_cfg
    return state.step % cfg.log_every == 0 or state.step in (1, cfg.total_steps)


def check_finite(step: int, metrics: dict[str, Tensor]) -> dict[str, float]:
    """Return metrics as floats (on a GPU this waits for the step)."""
    values = {name: value.item() for name, value in metrics.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise NonFiniteError(
                f"{name} of step {step} is {value} (batch key: seed and step {step - 1})"
            )
    return values
