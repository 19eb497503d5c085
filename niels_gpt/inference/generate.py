"""Generate bytes, one forward pass each, with cached keys and values of the bytes before.

`begin` and `extend` are pure: the next byte depends only on a `Context`, and
`extend(begin(text), byte)` is `begin(text + byte)`, up to float32 rounding.

The window. The model sees at most T bytes. A text of n bytes is seen from `window_start(n, T)` on:
all of it up to T; then, whenever it would exceed T, the older half of the window is dropped and the
rest is read again in one pass. More than the last T // 2 bytes are always seen, three quarters of
T on average, and which ones depends only on n. Always using the last T would leave nothing to
cache, because the values of a byte depend on all bytes before it, dropped ones included.

Shapes: B texts, t bytes in the window (at most T), V byte values.
"""

import codecs
import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from niels_gpt.config import ModelConfig
from niels_gpt.loss import rows_per_block
from niels_gpt.model.blocks import KV
from niels_gpt.model.gpt import GPT, Past, no_past, skeleton
from niels_gpt.optim.trees import Tree
from niels_gpt.rng import keyed_generator

START = b"\n"  # stands for an empty prompt: a text starts on a new line
BYTES = 256  # a larger vocabulary has more ids; only these are drawn


class Context(NamedTuple):
    """Everything that the next byte of each of B texts depends on."""

    window: Tensor  # (B, t) int64, the visible bytes
    past: Past  # their keys and values
    logits: Tensor  # (B, V) of the byte after them


@dataclass(frozen=True)
class Sampling:
    """How a byte is drawn from logits; the default is the model's own distribution.

    Raises:
        ValueError: on construction, naming the field that is out of range.
    """

    temperature: float = 1.0  # divides the logits; 0 takes the most likely byte
    top_k: int | None = None  # only the k most likely
    top_p: float | None = None  # only the smallest set of most likely bytes that reaches this

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be 1 or more, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


# --- the window --------------------------------------------------------------------------------


def bind(params: Tree, cfg: ModelConfig) -> GPT:
    """Return a model in eval mode whose weights are these tensors, not copies.

    Calling it takes half a millisecond less than `functional_call`, which matters for one byte.
    """
    model = copy.deepcopy(skeleton(cfg))
    tied = {**params, "lm_head.weight": params["tok_emb.weight"]}
    model.load_state_dict(tied, assign=True)
    model.lm_head.weight = model.tok_emb.weight  # assigning unties them
    return model


def window_start(n: int, T: int) -> int:
    """Return where the window of a text of n bytes starts: 0 up to n = T, then in halves of T."""
    half = T - T // 2
    return max(0, math.ceil((n - T) / half) * half)


@torch.no_grad()
def begin(model: GPT, ids: Tensor) -> Context:
    """Read the windows of texts (B, n), n at least 1, in one pass; `model` in eval mode."""
    window = ids[:, window_start(ids.shape[1], model.cfg.T) :]
    blocks = torch.split(window, rows_per_block(window.shape[1]))
    parts = [_read(model, block, no_past(model.cfg, len(block), ids.device)) for block in blocks]
    return parts[0] if len(parts) == 1 else _stack(parts)


@torch.no_grad()
def extend(model: GPT, context: Context, ids: Tensor) -> Context:
    """Append one byte (B,) to each text."""
    T = model.cfg.T
    if context.window.shape[1] == T:
        return begin(model, torch.cat((context.window[:, T - T // 2 :], ids[:, None]), dim=1))
    read = _read(model, ids[:, None], context.past)
    return read._replace(window=torch.cat((context.window, read.window), dim=1))


def _read(model: GPT, ids: Tensor, past: Past) -> Context:
    """Read bytes (B, n) after those that `past` holds."""
    logits, past = model.read(ids, past)
    return Context(ids, past, logits[:, -1, :BYTES])


def _stack(parts: Sequence[Context]) -> Context:
    """Join the texts of several contexts into one."""
    windows, pasts, logits = zip(*parts, strict=True)
    past = tuple(
        KV(torch.cat([kv.k for kv in of_block]), torch.cat([kv.v for kv in of_block]))
        for of_block in zip(*pasts, strict=True)
    )
    return Context(torch.cat(windows), past, torch.cat(logits))


def _repeat(context: Context, n: int) -> Context:
    """Expand the single text of a context to n texts, without copying."""
    past = tuple(KV(kv.k.expand(n, -1, -1, -1), kv.v.expand(n, -1, -1, -1)) for kv in context.past)
    return Context(context.window.expand(n, -1), past, context.logits.expand(n, -1))


# --- drawing a byte ----------------------------------------------------------------------------


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities (B, V) with which bytes are drawn.

    Applies the temperature, then top-k, then top-p to what top-k left. Among equals, the lower byte
    ranks higher. The most likely byte always stays, as does the one that crosses top_p.

    Raises:
        ValueError: if a logit is not finite.
    """
    if not logits.isfinite().all():
        raise ValueError("the model's output is not finite: no byte can be drawn")
    if sampling.temperature < torch.finfo(torch.float32).tiny:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    probs = ((logits - logits.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)
    if sampling.top_k is None and sampling.top_p is None:
        return probs
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    ranked = probs.gather(-1, order)
    if sampling.top_k is not None:
        ranked[..., sampling.top_k :] = 0
        ranked /= ranked.sum(-1, keepdim=True)
    if sampling.top_p is not None and sampling.top_p < 1:
        reached = ranked.cumsum(-1)[..., :-1] >= sampling.top_p  # by this byte and more likely ones
        ranked[..., 1:].masked_fill_(reached, 0)
        ranked /= ranked.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, order, ranked)


def invert_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Return the bytes (B,) at which the cumulative probabilities (B, V) pass uniforms (B,).

    For uniforms in [0, 1) this is never a byte of probability 0, despite rounding.
    """
    cdf = probs.cumsum(-1)
    return (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(-1)


# --- texts -------------------------------------------------------------------------------------


@torch.no_grad()
def stream(
    params: Tree,
    cfg: ModelConfig,
    prompt: bytes,
    max_bytes: int,
    *,
    seed: int = 0,
    samples: Sequence[int] = (0,),
    sampling: Sampling | None = None,
    purpose: str = "sample",
) -> Iterator[bytes]:
    """Yield the next byte of every sample, max_bytes times.

    Draw k of sample i is a function of (seed, purpose, i, k): a sample is the same alone, in a
    batch and on every device, up to the rounding of the logits. Sampling happens on the CPU, so
    that it does not depend on the device. An empty prompt is START.

    Args:
        params: as in `TrainState`, on the device to use.
        samples: the indices i; all are generated in one pass.
    """
    sampling = sampling or Sampling()
    generators = [keyed_generator(seed, purpose, i) for i in samples]
    device = params["tok_emb.weight"].device
    seen = (prompt or START)[window_start(len(prompt), cfg.T) :]
    model = bind(params, cfg)
    context = _repeat(begin(model, torch.tensor([list(seen)], device=device)), len(generators))
    for left in reversed(range(max_bytes)):
        uniforms = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        ids = invert_cdf(distribution(context.logits.cpu(), sampling), uniforms)
        yield bytes(ids.tolist())
        if left:
            context = extend(model, context, ids.to(device))


def generate(
    params: Tree,
    cfg: ModelConfig,
    prompt: bytes,
    max_bytes: int,
    *,
    seed: int = 0,
    samples: Sequence[int] = (0,),
    sampling: Sampling | None = None,
    purpose: str = "sample",
) -> list[bytes]:
    """Return max_bytes bytes that continue the prompt for every sample, as `stream` does."""
    how: dict[str, Any] = {"seed": seed, "samples": samples, "sampling": sampling}
    steps = stream(params, cfg, prompt, max_bytes, purpose=purpose, **how)
    columns = zip(*steps, strict=True)
    return [bytes(column) for column in columns] or [b"" for _ in samples]


def decode_stream(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield text as soon as its characters are complete; invalid UTF-8 becomes U+FFFD.

    The pieces joined are `b"".join(chunks).decode("utf-8", errors="replace")`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for chunk in chunks:
        if piece := decoder.decode(chunk):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
