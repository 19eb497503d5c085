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
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from niels_gpt.config import ModelConfig
from niels_gpt.inference.cached import Cache, Weights, bind, empty_cache, read_first, read_next
from niels_gpt.loss import rows_per_block
from niels_gpt.optim.trees import Tree
from niels_gpt.rng import keyed_generator

START = b"\n"  # stands for an empty prompt: a text starts on a new line
BYTES = 256  # a larger vocabulary has more ids; only these are drawn


class Context(NamedTuple):
    """Everything that the next byte of each of B texts depends on."""

    cache: Cache  # of which this context is the first t positions
    t: int
    logits: Tensor  # (B, V) of the byte after them

    @property
    def window(self) -> Tensor:
        """The visible bytes, (B, t) int64."""
        return self.cache.ids[:, : self.t]

    @property
    def past(self) -> Tensor:
        """Their rotated keys and their values, (L, 2, B, H, t, D)."""
        return self.cache.kv[..., : self.t, :]


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


def window_start(n: int, T: int) -> int:
    """Return where the window of a text of n bytes starts: 0 up to n = T, then in halves of T."""
    half = T - T // 2
    return max(0, math.ceil((n - T) / half) * half)


@torch.inference_mode()
def begin(weights: Weights, ids: Tensor) -> Context:
    """Read the windows of texts (B, n), n at least 1, in one pass."""
    window = ids[:, window_start(ids.shape[1], weights.cfg.T) :]
    B, t = window.shape
    cache = empty_cache(weights, B)
    size = rows_per_block(t)
    blocks = [slice(start, min(start + size, B)) for start in range(0, B, size)]
    logits = [read_first(weights, window[rows], cache, rows)[:, :BYTES] for rows in blocks]
    cache.filled = t
    return Context(cache, t, torch.cat(logits))


@torch.inference_mode()
def extend(weights: Weights, context: Context, ids: Tensor) -> Context:
    """Append one byte (B,) to each text. A second future of one context gets a cache of its own."""
    cache, t, _ = context
    T = weights.cfg.T
    if t == T:
        return begin(weights, torch.cat((context.window[:, T - T // 2 :], ids[:, None]), dim=1))
    if cache.filled != t:
        cache = cache.fork(t)
    cache.filled = t + 1
    return Context(cache, t + 1, read_next(weights, ids, cache, t)[:, :BYTES])


def _repeat(context: Context, n: int) -> Context:
    """Copy the single text of a context n times."""
    if n == 1:
        return context
    return Context(context.cache.fork(context.t, n), context.t, context.logits.expand(n, -1))


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


@torch.inference_mode()
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
    weights = bind(params, cfg)
    context = _repeat(begin(weights, torch.tensor([list(seen)], device=device)), len(generators))
    for left in reversed(range(max_bytes)):
        uniforms = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        ids = invert_cdf(distribution(context.logits.cpu(), sampling), uniforms)
        yield bytes(ids.tolist())
        if left:
            context = extend(weights, context, ids.to(device))


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
