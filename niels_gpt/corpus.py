"""The text of a run as a value: its sources, and the batch of each step."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from niels_gpt import streams
from niels_gpt.batching import draw_rows, renormalise
from niels_gpt.config import ConfigDocument, ModelConfig, TrainConfig
from niels_gpt.data.sources import SOURCES, Given, option_of
from niels_gpt.loss import Batch
from niels_gpt.lr_schedule import lr_of_step
from niels_gpt.mix import may_choose_val, with_mix
from niels_gpt.rng import keyed_generator
from niels_gpt.state import TrainState
from niels_gpt.step import StepFunction, batch_of_step, loop_step
from niels_gpt.streams import SourceInfo, StreamBuildConfig, locate


class Row(NamedTuple):
    """A row of a batch: T + 1 bytes. The model reads all but the last, predicts all but the first.

    In `text`, invalid UTF-8 (as where a character is cut) is replaced.
    """

    row: int
    source: str
    start: int  # offset in the source
    text: str


@dataclass(frozen=True)
class Corpus:
    """The text that a run trains and is evaluated on. Batch k depends only on this value and k."""

    train: Mapping[str, bytes]  # by source
    val: Mapping[str, bytes]
    p: Mapping[str, float]  # probability of each source of `train`
    seed: int
    B: int  # rows per batch
    T: int  # bytes per row
    messages: Sequence[str] = ()  # for the user
    val_source: str = "wiki"  # the source of `val` that decides best.pt

    @property
    def validation(self) -> bytes:
        """The text that every evaluation of the run scores."""
        return self.val[self.val_source]

    def batch(self, k: int, device: torch.device | str = "cpu") -> Batch:
        """Draw the batch of update k (from 0): x and y, each int64 (B, T) on `device`."""
        return batch_of_step(self.seed, k, self.train, p=self.p, B=self.B, T=self.T, device=device)

    def rows(self, k: int) -> list[Row]:
        """Return the rows of batch k as text, with their positions in the sources."""
        generator = keyed_generator(self.seed, "batch", k)
        drawn = draw_rows(self.train, p=self.p, B=self.B, T=self.T, generator=generator)
        return [
            Row(
                i,
                name,
                start,
                self.train[name][start : start + self.T + 1].decode(errors="replace"),
            )
            for i, (name, start) in enumerate(drawn)
        ]

    @cached_property
    def sources(self) -> dict[str, dict[str, SourceInfo]]:
        """Split -> source -> description of the stream; hashes streams not built by `streams`."""
        splits = {"train": self.train, "val": self.val}
        return {split: streams.describe_sources(given) for split, given in splits.items()}

    @property
    def record(self) -> dict[str, dict[str, dict[str, Any]]]:
        """`sources` as a checkpoint keeps them: the same on every machine."""
        return {
            split: {name: info.record() for name, info in infos.items()}
            for split, infos in self.sources.items()
        }


def as_given(
    cfg: TrainConfig,
    given: Given,
    document: ConfigDocument | None = None,
    overrides: Iterable[str] = (),
) -> tuple[TrainConfig, StreamBuildConfig]:
    """Return the config of a new run with the shares that the user gave, and where its text is.

    Args:
        document, overrides: what the config is from; None: the defaults.

    Raises:
        FileNotFoundError: if a given place does not exist.
    """
    cfg = with_mix(cfg, given)
    any_val = may_choose_val(cfg, given, document, overrides)
    return cfg, replace(locate(given), any_val=any_val)


def open_corpus(model_cfg: ModelConfig, train_cfg: TrainConfig, where: StreamBuildConfig) -> Corpus:
    """Build the text of a run; shift the shares of absent sources to the available ones.

    Where any validation text will do, `val_source` of the corpus is the source with the largest
    share that has one.

    Raises:
        ValueError, RuntimeError: if a stream is too short, or there is no text to train on.
    """
    train, val = streams.build_train_val_sources(model_cfg, train_cfg, build_cfg=where)
    why: Mapping[str, str] = getattr(train, "missing", {})
    wanted = [name for name, share in train_cfg.p_train.items() if share > 0]
    if not any(name in train for name in wanted):
        raise ValueError("; ".join(["there is no text to train on", *_remedies(wanted, why)]))
    p = renormalise(train_cfg.p_train, train)
    shares = ", ".join(f"{name} {share:.4g}" for name, share in p.items())
    left_out = [
        f"{name}: left out ({why.get(name, 'no such source')}); the shares are now {shares}"
        for name, share in train_cfg.p_train.items()
        if share > 0 and name not in p
    ]
    messages = [*getattr(train, "messages", []), *left_out]
    judge = train_cfg.val_source
    if where.any_val:
        judge = _largest_with_validation(p, val, messages)
        messages.append(
            f"best.pt is chosen by the validation loss on {judge} (--set train.val_source=NAME)"
        )
    if "text" in where.places and not where.demanded:
        messages.append(f"the shares are {shares}")
    return Corpus(train, val, p, train_cfg.seed, train_cfg.B, model_cfg.T, messages, judge)


def _remedies(names: Iterable[str], why: Mapping[str, str]) -> Iterator[str]:
    """Yield why each source is not there, and the option that names its place."""
    for name in names:
        option = f"{option_of(name)} {SOURCES[name].metavar}" if name in SOURCES else "no option"
        yield f"{name}: {why.get(name, 'no such source')} ({option} names one)"


def _largest_with_validation(
    p: Mapping[str, float], val: Collection[str], known: Sequence[str]
) -> str:
    """Return the source with the largest share that has a validation text, the first of equals."""
    with_val = [name for name in p if name in val]
    if not with_val:
        raise ValueError(
            f"no source has a validation text: {'; '.join(known)}; give more text, a smaller "
            "model.T, --text FILE, which is split within the file, or another source with --set "
            "train.val_source=NAME"
        )
    return max(with_val, key=p.__getitem__)


def next_batch(state: TrainState, corpus: Corpus) -> Batch:
    """Draw the batch of a run's next step, on the device of its state."""
    return corpus.batch(state.step, state.device)


def advance(
    state: TrainState, corpus: Corpus, step: StepFunction = loop_step
) -> tuple[TrainState, dict[str, Tensor]]:
    """Take a run's next step, as the training loop does."""
    return step(state, next_batch(state, corpus), lr_of_step(state.step, state.train_cfg))
