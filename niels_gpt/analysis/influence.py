"""Influence: the first-order effect of training on a document on the validation loss.

Shapes: n pieces of documents, T positions.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from niels_gpt.analysis.noise import OnProgress
from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.data.documents import read_documents
from niels_gpt.data.recipe import Reading, Unavailable
from niels_gpt.data.roam import read_notes
from niels_gpt.eval import eval_batches
from niels_gpt.loss import Batch, gradients, row_slopes
from niels_gpt.optim.trees import Tree
from niels_gpt.state import TrainState
from niels_gpt.streams import StreamBuildConfig, reading

BLOCK = 32  # pieces of documents padded into one tensor


class Influence(NamedTuple):
    """The influence of a document on the validation loss."""

    name: str
    nbytes: int
    value: float  # see `influences`


def validation_gradient(state: TrainState, stream: bytes, batches: int) -> tuple[Tree, float]:
    """Return v, the gradient on the first batches of `evaluate`, and v . g for as many after them.

    The latter is an unbiased estimate of |G|^2. |v|^2 is not: it includes the noise of v,
    tr(Sigma) / rows, which dominates late in a run. Without dropout.
    """
    cfg, model_cfg = state.train_cfg, state.model_cfg
    drawn = eval_batches(
        stream,
        B=cfg.B,
        T=model_cfg.T,
        device=state.device,
        eval_steps=2 * batches,
        seed=cfg.seed,
    )
    x, y = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    n = batches * cfg.B
    v, _ = gradients(state.params, (x[:n], y[:n]), model_cfg)
    return v, row_slopes(state.params, v, (x[n:], y[n:]), model_cfg).mean().item()


def influences(
    params: Tree,
    direction: Tree,
    documents: Sequence[tuple[str, bytes]],
    cfg: ModelConfig,
    *,
    unit: float,
    windows: int = 2,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Influence]:
    """Return how much a step on each document helps along `direction`, the validation gradient v.

    A gradient step of size lr on document d changes the validation loss by -lr v . g_d + O(lr^2),
    where g_d is the gradient of the mean loss over its bytes (Pruthi et al. 2020, TracIn, arXiv
    2002.08484, at one checkpoint). The value is v . g_d / unit. If the unit is the v . g of other
    validation text, 1 helps as much as a step on that, 0 not at all, below 0 it hurts. All
    v . g_d come from one forward-mode pass along v; no document is differentiated backwards.

    Args:
        documents: names and UTF-8 text; each of at least 2 bytes.
        unit: the v . g that counts as 1; see `validation_gradient`.
        windows: maximum number of evenly spread pieces of T + 1 bytes to take of each.
    """
    device = params["tok_emb.weight"].device
    pieces = [
        (i, piece) for i, (_, text) in enumerate(documents) for piece in cut(text, cfg.T, windows)
    ]
    sums, counts = [0.0] * len(documents), [0] * len(documents)
    for start in range(0, len(pieces), BLOCK):
        block = pieces[start : start + BLOCK]
        x, y = (ids.to(device) for ids in pad([piece for _, piece in block], cfg.T))
        slopes = row_slopes(params, direction, (x, y), cfg).tolist()
        for (i, piece), slope in zip(block, slopes, strict=True):
            sums[i] += slope * cfg.T  # a slope is the sum over the piece, divided by T
            counts[i] += len(piece) - 1
        on_progress(start + len(block), len(pieces))
    return [
        Influence(name, len(text), total / count / unit)
        for (name, text), total, count in zip(documents, sums, counts, strict=True)
    ]


def documents_worth(
    state: TrainState,
    val_stream: bytes,
    documents: Sequence[tuple[str, bytes]],
    *,
    batches: int = 4,
    windows: int = 2,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Influence]:
    """Return the influence of each document on the loss of the validation stream.

    Raises:
        ValueError: if the gradient of so few batches is lost in noise.
    """
    direction, unit = validation_gradient(state, val_stream, batches)
    if not unit > 0:
        raise ValueError(
            f"the gradient of {batches} validation batches is lost in noise: use more (--batches)"
        )
    return influences(
        state.params,
        direction,
        documents,
        state.model_cfg,
        unit=unit,
        windows=windows,
        on_progress=on_progress,
    )


def training_documents(
    cfg: StreamBuildConfig, train_cfg: TrainConfig, *, min_bytes: int = 64
) -> list[tuple[str, bytes]]:
    """Return what a run trains on of notes and of own text, document by document, by name.

    A name is the path below the folder, or that of a file named itself. Own text is also taken if
    it is named in the config, and of a run that was on neither the notes are.

    Raises:
        ValueError, RuntimeError: if none has at least `min_bytes`.
    """
    cfg = replace(cfg, seed=train_cfg.seed)
    found: list[tuple[str, bytes]] = []
    if train_cfg.p_train.get("text") or "text" in cfg.places:
        found += read_documents(reading("text", cfg))
    if train_cfg.p_train.get("roam") or not found:
        try:
            found += _notes(reading("roam", cfg))
        except Unavailable:  # a run goes without notes that are not there
            if not found or "roam" in cfg.places:
                raise
    found = [document for document in found if len(document[1]) >= max(2, min_bytes)]
    if not found:
        raise ValueError(f"no note or file has {min_bytes} bytes or more")
    return found


def _notes(how: Reading) -> list[tuple[str, bytes]]:
    root = os.path.abspath(how.place)
    return [(os.path.relpath(path, root), text) for path, text in read_notes(how).train]


def cut(text: bytes, T: int, windows: int) -> list[bytes]:
    """Cut at most `windows` evenly spread pieces of T + 1 bytes out of a text."""
    last = len(text) - (T + 1)
    if last <= 0:
        return [text]
    n = min(windows, math.ceil(len(text) / (T + 1)))
    starts = [last // 2] if n == 1 else [last * i // (n - 1) for i in range(n)]
    return [text[start : start + T + 1] for start in starts]


def pad(pieces: Sequence[bytes], T: int) -> Batch:
    """Return x and y, each (n, T), for pieces of 2 to T + 1 bytes.

    Padding has the target -100, which `cross_entropy` ignores.
    """
    x = torch.zeros(len(pieces), T, dtype=torch.int64)
    y = torch.full((len(pieces), T), -100)
    for i, piece in enumerate(pieces):
        ids = torch.tensor(list(piece))
        x[i, : len(piece) - 1], y[i, : len(piece) - 1] = ids[:-1], ids[1:]
    return x, y
