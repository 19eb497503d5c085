"""Whether a device computes what a run relies on: the same bits twice, and what the CPU computes.

What a GPU computes depends on its driver and system, so a user's own machine has to tell.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.inference.cached import bind
from niels_gpt.inference.generate import begin, extend
from niels_gpt.loss import Batch, gradients, rows_per_block
from niels_gpt.model.dropout import dropout_keys, keep_mask
from niels_gpt.optim import OPTIMIZERS
from niels_gpt.optim.trees import Tree, bits, map_tensors, to_vector, tree_difference
from niels_gpt.run.compile import TOLERANCE
from niels_gpt.run.plan import Plan
from niels_gpt.run.progress import Console
from niels_gpt.state import TrainState, make_state
from niels_gpt.step import batch_of_step, dropout_of_step, loop_step

STEPS = 4
MODEL = ModelConfig(T=128, C=128, L=2, H=4, d_ff=512)
TRAIN = TrainConfig(B=32, warmup_steps=0)  # two blocks of rows
LR = 1e-3
TEXT = bytes(i * i % 251 for i in range(20_000))


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    passed: bool
    found: str


def selfcheck(device: str) -> Iterator[Check]:
    """Compare a device with itself and with the CPU; takes seconds."""
    yield _exact("dropout masks as on the CPU", _mask(device), _mask("cpu"))
    yield _exact("batches as on the CPU", _ids(device), _ids("cpu"))
    yield _exact("weights there and back", _weights(device), _weights("cpu"))
    yield _close("the next byte as on the CPU", _logits(device), _logits("cpu"))
    yield from gradient_checks(make_state(MODEL, TRAIN, device), _batch(0, device))
    for optimizer in OPTIMIZERS:
        cfg, name = replace(TRAIN, optimizer=optimizer), f"{STEPS} steps of {optimizer}"
        (first, losses), (again, _) = _steps(cfg, device), _steps(cfg, device)
        yield _exact(f"{name}, twice", _vector(first), _vector(again))
        yield _close(f"losses of {name} as on the CPU", losses, _steps(cfg, "cpu")[1])


def gradient_checks(state: TrainState, batch: Batch) -> Iterator[Check]:
    """Compare the gradient of the first block of rows with itself and with the CPU's."""
    x, y = (ids[: rows_per_block(ids.shape[1])] for ids in batch)
    drop = dropout_of_step(state.train_cfg.seed, state.step, range(len(x)), state.model_cfg)

    def on(device: torch.device | str) -> Tree:
        params, block, keys = map_tensors(lambda t: t.to(device), (state.params, (x, y), drop))
        return gradients(params, block, state.model_cfg, keys)[0]

    first, again = on(state.device), on(state.device)
    yield _exact("gradients, twice", to_vector(first), to_vector(again))
    yield _close("gradients as on the CPU", first, on("cpu"))


def check_start(plan: Plan, console: Console) -> None:
    """Say, before a run on a GPU, whether its gradients repeat and agree with the CPU's."""
    state, device = plan.state, plan.environment["device"]
    if device == "cpu" or state.step >= state.train_cfg.total_steps:
        return
    for check in gradient_checks(state, plan.corpus.batch(state.step, device)):
        if check.passed:
            console.say(f"{device}: {check.name}: {check.found}")
        else:
            console.warn(
                f"warning: {device}: {check.name}: {check.found}; "
                f"see niels-gpt selfcheck --device {device}, or use --device cpu"
            )


# --- what is compared --------------------------------------------------------------------------


def _mask(device: str) -> Tensor:
    key = dropout_keys(0, 1, range(8), 1)[:, 0].to(device)
    return keep_mask(key, (64, 64), 0.1, start=7)


def _batch(step: int, device: str) -> Batch:
    cfg, source = TRAIN, {"text": TEXT}
    return batch_of_step(cfg.seed, step, source, p={"text": 1.0}, B=cfg.B, T=MODEL.T, device=device)


def _ids(device: str) -> Tensor:
    return torch.cat(_batch(0, device))


def _weights(device: str) -> Tensor:
    return to_vector(make_state(MODEL, TRAIN, device).params)


def _logits(device: str) -> Tree:
    """Return the logits of a byte that follows a text whose keys and values are known."""
    weights = bind(make_state(MODEL, TRAIN, device).params, MODEL)
    x = _batch(0, device)[0][:2]
    return {"logits": extend(weights, begin(weights, x[:, :-1]), x[:, -1]).logits}


def _steps(cfg: TrainConfig, device: str) -> tuple[TrainState, Tree]:
    """Take a few steps; return the state after them and the losses."""
    state, losses = make_state(MODEL, cfg, device), []
    for step in range(STEPS):
        state, metrics = loop_step(state, _batch(step, device), LR)
        losses.append(metrics["loss"])
    return state, {"losses": torch.stack(losses)}


def _vector(state: TrainState) -> Tensor:
    return torch.cat([to_vector(tree) for tree in state.trees().values()])


# --- comparisons -------------------------------------------------------------------------------


def _exact(name: str, a: Tensor, b: Tensor) -> Check:
    a, b = a.cpu(), b.cpu()
    differ = int((bits(a) != bits(b)).sum() if a.is_floating_point() else (a != b).sum())
    if not differ:
        return Check(name, True, f"{a.numel():,} values, the same bits")
    return Check(name, False, f"{differ:,} of {a.numel():,} values differ")


def _close(name: str, found: Tree, expected: Tree) -> Check:
    found, expected = map_tensors(lambda t: t.cpu(), (found, expected))
    difference = tree_difference(expected, found).item()
    return Check(name, difference <= TOLERANCE, f"differ by {difference:.1e}")
