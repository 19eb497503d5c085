"""The sides of a comparison: callables that each do one thing once, such as a step of their run.

A side may be another checkout's: it then lives in a process of its own, which imports `niels_gpt`
from there and this file from here, so this file uses names only that older checkouts have too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import nn

import niels_gpt.step
from benchmarks.imperative import ImperativeGPT, imperative_step, make_optimizer
from niels_gpt import evaluate, make_state
from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.device import keep_freed_memory
from niels_gpt.inference.generate import generate
from niels_gpt.loss import Batch
from niels_gpt.run.compile import compile_step

Side = Callable[[], object]

HERE = Path(__file__).parent.parent
SIDES = ("imperative", "niels_gpt")
EVALUATED = 1_000_000  # bytes of the text that is evaluated
SAMPLED = 252  # bytes after a prompt of four: a window

# What the trainer's loop calls; an older checkout has `train_step` only.
loop_step: Callable[..., Any] = getattr(niels_gpt.step, "loop_step", niels_gpt.step.train_step)


def make_side(
    name: str, model_cfg: ModelConfig, train_cfg: TrainConfig, compiled: bool = False
) -> Side:
    """Return a side of `MAKERS`, ready."""
    return MAKERS[name](model_cfg, train_cfg, compiled)


def imperative_side(model_cfg: ModelConfig, train_cfg: TrainConfig, compiled: bool = False) -> Side:
    """Return a step of the plain loop."""
    model: nn.Module = ImperativeGPT(model_cfg)
    optimizer = make_optimizer(model, train_cfg)
    if compiled:
        model = cast(nn.Module, torch.compile(model))
    x, y = random_batch(model_cfg, train_cfg)

    def step() -> None:
        imperative_step(model, optimizer, x, y, lr=train_cfg.base_lr, grad_clip=train_cfg.grad_clip)

    return step


def our_side(model_cfg: ModelConfig, train_cfg: TrainConfig, compiled: bool = False) -> Side:
    """Return a step of the trainer's loop."""
    state = make_state(model_cfg, train_cfg)
    batch = random_batch(model_cfg, train_cfg)
    update = compile_step() if compiled else loop_step

    def step() -> None:
        nonlocal state
        state, _ = update(state, batch, train_cfg.base_lr)

    return step


def evaluation_side(model_cfg: ModelConfig, train_cfg: TrainConfig, compiled: bool = False) -> Side:
    """Return an evaluation of `eval_steps` batches."""
    state = make_state(model_cfg, train_cfg)
    text = bytes(torch.randint(256, (EVALUATED,), dtype=torch.uint8).tolist())
    return lambda: evaluate(state, text, 1)


def sampling_side(model_cfg: ModelConfig, train_cfg: TrainConfig, compiled: bool = False) -> Side:
    """Return the generation of B texts, draws included."""
    params = make_state(model_cfg, train_cfg).params
    return lambda: generate(params, model_cfg, b"The ", SAMPLED, samples=range(train_cfg.B))


MAKERS: dict[str, Callable[..., Side]] = {
    "imperative": imperative_side,
    "niels_gpt": our_side,
    "evaluate": evaluation_side,
    "sample": sampling_side,
}


def random_batch(model_cfg: ModelConfig, train_cfg: TrainConfig) -> Batch:
    """Draw x and y (B, T) of random bytes: a step costs the same on any text."""
    x, y = torch.randint(model_cfg.V, (2, train_cfg.B, model_cfg.T))
    return x, y


# --- another checkout's ------------------------------------------------------------------------

SERVE = """
import sys
import niels_gpt  # the checkout's, where this process runs
sys.path.insert(0, sys.argv[1])
from benchmarks.sides import serve
serve(sys.argv[2])
"""


@contextmanager
def side_of(
    checkout: Path,
    name: str,
    model_cfg: ModelConfig,
    train_cfg: TrainConfig,
    compiled: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[Side]:
    """Yield a side with the package of a checkout, in a process that waits between calls."""
    what = {"name": name, "compiled": compiled, "threads": torch.get_num_threads()}
    what |= {"model": asdict(model_cfg), "train": asdict(train_cfg)}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVE, str(HERE), json.dumps(what)],
        cwd=checkout,
        env={**environment, "PYTHONPATH": str(checkout)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        requests, answers = cast(IO[str], process.stdin), cast(IO[str], process.stdout)

        def once() -> None:
            print(file=requests, flush=True)
            if not answers.readline():
                raise RuntimeError(f"the side {name} of {checkout} ended")

        once()
        yield once
        requests.close()  # the process ends at the end of its input


def serve(what: str) -> None:
    """Do a side once for each line of standard input, and answer each by a line."""
    asked = json.loads(what)
    torch.set_num_threads(asked["threads"])
    keep_freed_memory()
    known = {field.name for field in fields(TrainConfig)}
    train_cfg = TrainConfig(**{k: v for k, v in asked["train"].items() if k in known})
    model_cfg = ModelConfig(**asked["model"])
    side = make_side(asked["name"], model_cfg, train_cfg, asked["compiled"])
    for _ in sys.stdin:
        side()
        print(flush=True)
