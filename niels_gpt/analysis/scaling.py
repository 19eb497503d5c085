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

REPEATS = 6.3  # R*: the repetitions after which a further one is worth 1/e
HEAD = 32  # width of an attention head
WARMUP = 0.1  # of the steps
LR, LR_WIDTH, LR_FALL = 0.014, 128, 0.85  # the rate at a width, and the power of its fall
SHAPES = (  # width and depth of the networks to choose from
    *((32, 2), (64, 2), (96, 3), (128, 3), (160, 4), (192, 4), (256, 4), (320, 5), (384, 6)),
    *((448, 7), (512, 8), (640, 10), (768, 12)),
)


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


# Fitted to docs/runs/scaling.jsonl by benchmarks/scaling.py, which has the runs; a test fits again.
LAW = Law(E=1.0, A=0.2352, a=0.2513, B=0.445, b=0.4004)
DRAWN = (  # fits to draws of the runs with replacement, E one of three: how far the law is known
    Law(E=1.0, A=0.2219, a=0.2528, B=0.4674, b=0.3805),
    Law(E=0.8, A=0.2887, a=0.2231, B=0.5827, b=0.2624),
    Law(E=1.1, A=0.1807, a=0.2961, B=0.4078, b=0.4695),
    Law(E=1.0, A=0.3248, a=0.21, B=0.3469, b=0.6102),
    Law(E=0.8, A=0.1676, a=0.3061, B=0.7179, b=0.2257),
    Law(E=1.1, A=0.2509, a=0.236, B=0.3435, b=0.7059),
    Law(E=1.0, A=0.2819, a=0.2213, B=0.3963, b=0.4868),
    Law(E=0.8, A=0.1402, a=0.3547, B=0.7188, b=0.1908),
    Law(E=1.1, A=0.246, a=0.2343, B=0.3474, b=0.6789),
    Law(E=1.0, A=0.3033, a=0.2161, B=0.367, b=0.5063),
    Law(E=0.8, A=0.1346, a=0.3638, B=0.7219, b=0.1874),
    Law(E=1.1, A=0.1262, a=0.3697, B=0.4344, b=0.3521),
)
LARGEST = (3_155_456, 16_777_216)  # N and D of the runs
TRUSTED = 3  # times as many: `night.json` has 3.4, and its loss was below the interval
SHORTEST = 512  # steps of the runs: in fewer, seeds differ too much, and the rate decides
NOISE = 0.02  # nats, about what seeds and the law leave


class Expected(NamedTuple):
    """A loss in nats per byte, and the interval that it is expected in."""

    nats: float
    low: float
    high: float


class Text(NamedTuple):
    """A source of text in a mix."""

    share: float  # of the training bytes
    nbytes: int  # distinct ones


def distinct_bytes(D: float, texts: Mapping[str, Text], repeats: float = REPEATS) -> float:
    """Return how many distinct bytes D bytes of a mix are worth.

    For a source of U bytes of which D are read, R = D / U - 1 times again, that is
    U + U R* (1 - exp(-R / R*)); all of D up to U.
    """
    return sum(_worth(D * text.share, text.nbytes, repeats) for text in texts.values())


def _worth(D: float, U: int, repeats: float) -> float:
    return min(D, U) - U * repeats * math.expm1(-max(0.0, D / U - 1) / repeats)


def expect(cfg: ModelConfig, D: float, texts: Mapping[str, Text]) -> Expected:
    """Return the loss that a network is expected to reach on D bytes of a mix.

    The interval is the range of the laws in `DRAWN`, widened by twice the noise.
    """
    N, worth = matrix_count(cfg), distinct_bytes(D, texts)
    nats = [law.loss(N, worth) for law in (LAW, *DRAWN)]
    return Expected(nats[0], min(nats) - 2 * NOISE, max(nats) + 2 * NOISE)


def beyond_the_runs(cfg: ModelConfig, D: float, steps: int) -> list[str]:
    """Return a message if a run has fewer steps than those that the law was fitted to, or is large.

    That is more than `TRUSTED` times the largest of them.
    """
    if steps < SHORTEST:
        return [
            f"the law was fitted to runs of {SHORTEST} steps and more: this one may end above it"
        ]
    ratio = max(matrix_count(cfg) / LARGEST[0], D / LARGEST[1])
    if ratio <= TRUSTED:
        return []
    return [
        f"the run is {ratio:.1f} times larger than the largest that the law was fitted to: "
        "do not rely on the interval"
    ]


def matrix_count(cfg: ModelConfig) -> int:
    """Count the parameters outside the embedding, as the law does."""
    return parameter_count(cfg) - cfg.V * cfg.C


# --- the runs that the law describes -----------------------------------------------------------


def model_config(C: int, L: int, T: int = 256) -> ModelConfig:
    """Return the network of a width and a depth."""
    return ModelConfig(T=T, C=C, L=L, H=max(1, C // HEAD), d_ff=4 * C, dropout=0.0)


def base_lr(C: int) -> float:
    """Return the learning rate for a width, to two digits."""
    return float(f"{LR * (LR_WIDTH / C) ** LR_FALL:.2g}")


def train_config(B: int, steps: int, lr: float, p_train: Mapping[str, float]) -> TrainConfig:
    """Return the schedule of a run: Muon, warmup over a tenth, then in a straight line to 0."""
    return TrainConfig(
        B=B,
        total_steps=steps,
        base_lr=lr,
        min_lr=0.0,
        lr_decay="linear",
        warmup_steps=round(steps * WARMUP),
        optimizer="muon",
        init="fan_in",
        p_train=dict(p_train),
    )
