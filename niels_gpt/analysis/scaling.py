"""The scaling law: the loss that a run of so many parameters and bytes reaches.

L(N, D) = E + A / N^a + B / D^b (Hoffmann et al. 2022, arXiv 2203.15556), with N the parameters
outside the embedding in millions, D the bytes trained on in millions, and L in nats per byte. Text
that is read again counts less each time (Muennighoff et al. 2023, arXiv 2305.16264, equation 5).
Arithmetic only.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.model.flops import parameter_count

REPEATS = 15.39  # R*: the repetitions after which a further one is worth 1/e (Muennighoff)
HEAD = 32  # width of an attention head
WARMUP = 0.1  # of the steps
LR, LR_WIDTH = 0.012, 128  # the rate of batches of 8 rows at this width
LR_FALL = 0.5  # the rate falls with this power of the width
LR_BATCH = 0.25  # and rises with this power of the batch


class Law(NamedTuple):
    """The constants of the law; N and D in millions, losses in nats per byte."""

    E: float  # what no size and no amount of text removes
    A: float  # lost by a network of a million parameters
    a: float
    B: float  # lost by a million bytes
    b: float

    def loss(self, N: float, D: float) -> float:
        """Return the loss of N parameters outside the embedding after D distinct bytes."""
        return float(self.E + self.A * (N / 1e6) ** -self.a + self.B * (D / 1e6) ** -self.b)


class Text(NamedTuple):
    """A source of text in a mix."""

    share: float  # of the training bytes
    nbytes: int  # distinct ones


def distinct_bytes(D: float, texts: Mapping[str, Text]) -> float:
    """Return how many distinct bytes D bytes of a mix are worth.

    For a source of U bytes of which D are read, R = D / U - 1 times again, that is
    U + U R* (1 - exp(-R / R*)); all of D up to U.
    """
    return sum(_worth(D * text.share, text.nbytes) for text in texts.values())


def _worth(D: float, U: int) -> float:
    return min(D, U) - U * REPEATS * math.expm1(-max(0.0, D / U - 1) / REPEATS)


def matrix_count(cfg: ModelConfig) -> int:
    """Count the parameters outside the embedding, as the law does."""
    return parameter_count(cfg) - cfg.V * cfg.C


# --- the runs that the law describes -----------------------------------------------------------


def model_config(C: int, L: int, T: int = 256) -> ModelConfig:
    """Return the network of a width and a depth."""
    return ModelConfig(T=T, C=C, L=L, H=max(1, C // HEAD), d_ff=4 * C, dropout=0.0)


def base_lr(C: int, B: int) -> float:
    """Return the learning rate for a width and a batch, to two digits."""
    rate = LR * (LR_WIDTH / C) ** LR_FALL * (B / 8) ** LR_BATCH
    return float(f"{rate:.2g}")


def train_config(B: int, steps: int, lr: float, p_train: Mapping[str, float]) -> TrainConfig:
    """Return the schedule of a run: Muon, warmup over a tenth, then down to 0."""
    return TrainConfig(
        B=B,
        total_steps=steps,
        base_lr=lr,
        min_lr=0.0,
        warmup_steps=round(steps * WARMUP),
        optimizer="muon",
        init="fan_in",
        p_train=dict(p_train),
    )
