"""The rows of a training batch, as text."""

from collections.abc import Mapping
from typing import NamedTuple

from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.run.plan import Text
from niels_gpt.step import batch_of_step


class Row(NamedTuple):
    """A window of T + 1 bytes: the model reads all but the last and predicts all but the first."""

    row: int
    source: str
    start: int  # the first place in the source at which these bytes stand
    text: str  # bytes that are not UTF-8, also those of a cut character, replaced


def rows_of_step(
    model_cfg: ModelConfig, train_cfg: TrainConfig, text: Text, step: int
) -> list[Row]:
    """Return the rows of the batch of step 1, 2, ..."""
    x, y = batch_of_step(
        train_cfg.seed, step - 1, text.train, p=text.p, B=train_cfg.B, T=model_cfg.T
    )
    windows = [bytes([*a, b[-1]]) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    return [
        Row(number, *find(text.train, window), window.decode(errors="replace"))
        for number, window in enumerate(windows)
    ]


def find(sources: Mapping[str, bytes], window: bytes) -> tuple[str, int]:
    """Return the first source that holds these bytes, and where."""
    places = ((name, stream.find(window)) for name, stream in sources.items())
    return next((name, start) for name, start in places if start >= 0)
