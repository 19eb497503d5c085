"""Evaluation: the mean loss over batches that depend only on a seed."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from niels_gpt.batching import get_batch
from niels_gpt.loss import Batch, cross_entropy, forward, row_blocks
from niels_gpt.model.gpt import GPT
from niels_gpt.rng import make_generator
from niels_gpt.state import TrainState


class Scores(NamedTuple):
    """The results of a run's evaluations, saved with the state in every checkpoint."""

    best_val_loss: float | None = None  # nats
    best_step: int | None = None
    val_loss: float | None = None  # nats, of the last evaluation
    val_step: int | None = None

    def updated(self, step: int, val_loss: float) -> "Scores":
        """Return the scores after an evaluation at `step`."""
        if self.best_val_loss is None or val_loss < self.best_val_loss:
            return Scores(val_loss, step, val_loss, step)
        return self._replace(val_loss=val_loss, val_step=step)


def evaluate(
    state: TrainState, stream: bytes, seed: int, *, on_batch: Callable[[int], object] | None = None
) -> float:
    """Return the mean cross entropy in nats over `eval_steps` batches of a stream.

    B, T and eval_steps come from the state's configs. The same state, stream and seed give the same
    result; nothing is changed and no global randomness is used.

    Args:
        on_batch: called with the number of finished batches, before each.

    Raises:
        ValueError: if the stream is shorter than T + 1.
    """
    batches: Iterable[Batch] = batches_of(state, stream, seed)
    if on_batch is not None:
        batches = _counted(batches, on_batch)
    return _mean_loss(lambda x: forward(state.params, x, state.model_cfg), batches)


def _counted(batches: Iterable[Batch], on_batch: Callable[[int], object]) -> Iterator[Batch]:
    for done, batch in enumerate(batches):
        on_batch(done)
        yield batch


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

    The result equals `evaluate`'s. The training mode of every submodule is restored, also when this
    raises.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _mean_loss(
            model, eval_batches(stream, B=B, T=T, device=device, eval_steps=eval_steps, seed=seed)
        )
    finally:
        for module, training in modes:
            module.training = training


def eval_batches(
    stream: bytes, *, B: int, T: int, device: torch.device | str, eval_steps: int, seed: int
) -> Iterator[Batch]:
    """Draw the batches of an evaluation, which depend only on the seed.

    Raises:
        ValueError: if there are none to draw, or the stream is shorter than T + 1.
    """
    if eval_steps < 1:
        raise ValueError(f"eval_steps={eval_steps} must be at least 1")
    generator = make_generator(seed)
    for _ in range(eval_steps):
        yield get_batch(
            {"stream": stream}, p={"stream": 1.0}, B=B, T=T, device=device, generator=generator
        )


def batches_of(state: TrainState, stream: bytes, seed: int) -> Iterator[Batch]:
    """Draw the batches of `evaluate(state, stream, seed)`."""
    cfg, T = state.train_cfg, state.model_cfg.T
    return eval_batches(
        stream, B=cfg.B, T=T, device=state.device, eval_steps=cfg.eval_steps, seed=seed
    )


@torch.no_grad()
def _mean_loss(logits_of: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> float:
    """Return the mean of the batches' mean losses, each computed in blocks of rows."""
    losses = []
    for batch in batches:
        parts = [cross_entropy(logits_of(x), y, reduction="sum") for (x, y), _ in row_blocks(batch)]
        losses.append(torch.stack(parts).sum().item() / batch[1].numel())
    return math.fsum(losses) / len(losses)
