"""Evaluation: the mean loss over batches that depend on a seed alone."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from niels_gpt.batching import get_batch
from niels_gpt.loss import Batch, cross_entropy, forward, rows_per_block
from niels_gpt.model.gpt import GPT
from niels_gpt.rng import make_generator
from niels_gpt.state import TrainState


def evaluate(state: TrainState, stream: bytes, seed: int) -> float:
    """Return the mean cross entropy in nats over `eval_steps` batches of a stream.

    B, T and eval_steps come from the state's configs. Same state, stream and seed, same result;
    nothing is changed and no global randomness is read.

    Raises:
        ValueError: if the stream is shorter than T + 1.
    """
    model_cfg, train_cfg = state.model_cfg, state.train_cfg
    return _mean_loss(
        lambda x: forward(state.params, x, model_cfg),
        stream,
        B=train_cfg.B,
        T=model_cfg.T,
        device=state.device,
        eval_steps=train_cfg.eval_steps,
        seed=seed,
    )


def eval_loss_on_stream(
    model: GPT,
    *,
    stream: bytes,
    B: int,
    T: int,
    device: str,
    eval_steps: int,
    seed: int,
) -> float:
    """Return the mean cross entropy in nats of a module over `eval_steps` batches of a stream.

    The training mode of each of its modules is restored, also when this raises. Its result is
    `evaluate`'s.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _mean_loss(model, stream, B=B, T=T, device=device, eval_steps=eval_steps, seed=seed)
    finally:
        for module, training in modes:
            module.training = training


def eval_batches(
    stream: bytes, *, B: int, T: int, device: torch.device | str, eval_steps: int, seed: int
) -> Iterator[Batch]:
    """Draw the batches of an evaluation, which depend on the seed alone."""
    generator = make_generator(seed)
    for _ in range(eval_steps):
        yield get_batch(
            {"stream": stream}, p={"stream": 1.0}, B=B, T=T, device=device, generator=generator
        )


@torch.no_grad()
def _mean_loss(
    logits_of: Callable[[Tensor], Tensor],
    stream: bytes,
    *,
    B: int,
    T: int,
    device: torch.device | str,
    eval_steps: int,
    seed: int,
) -> float:
    losses = []
    for x, y in eval_batches(stream, B=B, T=T, device=device, eval_steps=eval_steps, seed=seed):
        rows = rows_per_block(T)
        parts = [
            cross_entropy(logits_of(x[i : i + rows]), y[i : i + rows], reduction="sum")
            for i in range(0, B, rows)
        ]
        losses.append(torch.stack(parts).sum().item() / y.numel())
    return math.fsum(losses) / eval_steps
