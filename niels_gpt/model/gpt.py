"""A byte-level GPT: pre-norm blocks, rotary positions, tied embeddings.

Shapes: B batch, T positions (at most cfg.T), C model width, V byte values.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from niels_gpt.config import ModelConfig
from niels_gpt.model import rope
from niels_gpt.model.blocks import STD, Block, drop_out, init_weights

ORDERED_LOOKUP = ("cpu", "cuda")  # devices that sum the gradient of a lookup in a fixed order
EMBEDDING_STD = 0.2  # of the embedding's first values, with `fan_in`


class GPT(nn.Module):
    """Map bytes to logits of the next byte.

    It is an ordinary module: `train()`, `eval()`, `state_dict()`, `torch.optim` work as usual. The
    training step passes parameters through `functional_call` and dropout keys through `drop`.
    There are no buffers, so a skeleton on the meta device suffices for that.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.tok_emb = nn.Embedding(cfg.V, cfg.C)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.L))
        self.ln_f = nn.LayerNorm(cfg.C, eps=1e-5)
        self.lm_head = nn.Linear(cfg.C, cfg.V, bias=False)
        self.lm_head.weight = self.tok_emb.weight
        self.apply(init_weights)

    def forward(self, x: Tensor, *, drop: Tensor | None = None) -> Tensor:
        """Compute logits (B, T, V) from token ids (B, T).

        Args:
            x: int64 ids, T at most cfg.T.
            drop: (B, sites, 2) int32 keys from `niels_gpt.model.dropout.dropout_keys`.

        Raises:
            ValueError: if T exceeds the context length.
        """
        h, tables = self._enter(x, drop)
        for i, block in enumerate(self.blocks):
            keys = None if drop is None else drop[:, 1 + 3 * i : 4 + 3 * i]
            h = block(h, drop=keys, tables=tables)
        logits: Tensor = self.lm_head(self.ln_f(h))
        return logits

    def _enter(self, x: Tensor, drop: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Embed ids (B, T); return (B, T, C), and sin and cos of their positions."""
        cfg, T = self.cfg, x.shape[-1]
        if x.ndim != 2 or T > cfg.T:
            raise ValueError(f"ids must be (B, T) with T <= {cfg.T}, got {tuple(x.shape)}")
        key = None if drop is None else drop[:, 0]
        h = drop_out(_embed(self.tok_emb, x), key, cfg.dropout, self.training)
        D = cfg.C // cfg.H
        return h, rope.rope_cache(T, D, theta=cfg.rope_theta, device=h.device, dtype=h.dtype)


def _embed(table: nn.Embedding, x: Tensor) -> Tensor:
    """Look up the rows (B, T, C) of ids (B, T), in a way whose gradient is a sum in a fixed order.

    In compiled code and on MPS, threads accumulate the gradient of a lookup in the order in which
    they arrive, so its last bits would differ from run to run. There it is a product with one-hots,
    which is exact too.
    """
    if x.device.type in ORDERED_LOOKUP and not torch.compiler.is_compiling():
        rows: Tensor = table(x)
        return rows
    one_hot = x.flatten()[:, None] == torch.arange(table.num_embeddings, device=x.device)
    return torch.mm(one_hot.to(table.weight.dtype), table.weight).view(*x.shape, -1)


def init_fan_in(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Initialise as `init_weights`, but each tensor at the size that suits its place.

    The matrices of a block become N(0, 1/fan-in) (LeCun et al. 1998; He et al. 2015, arXiv
    1502.01852), so that each passes on the size of its input: the 0.02 of GPT-2 suits widths of 768
    to 1600, and at C = 256 is a third of C**-0.5. The matrices that write to the residual stream
    become 0, so that every block starts as the identity (Zhang et al. 2019, arXiv 1901.09321).

    The embedding becomes N(0, 0.2) and `ln_f.weight` 0.1. The first logits stay about the same,
    but AdamW, which moves an element by about the learning rate, no longer replaces a table of 0.02
    within its first updates.
    """
    init_weights(module, generator)
    with torch.no_grad():
        if isinstance(module, Block):
            for layer in (module.attn.qkv, module.mlp.fc1):
                layer.weight.mul_(layer.in_features**-0.5 / STD)
            for layer in (module.attn.proj, module.mlp.fc2):
                layer.weight.zero_()
        elif isinstance(module, GPT):
            module.tok_emb.weight.mul_(EMBEDDING_STD / STD)
            module.ln_f.weight.fill_(STD / EMBEDDING_STD)


INITS = {"normal": init_weights, "fan_in": init_fan_in}


class _Skeletons(threading.local):
    """Skeletons per thread, because `functional_call` swaps a module's tensors while it runs."""

    def __init__(self) -> None:
        self.of: dict[ModelConfig, GPT] = {}


_skeletons = _Skeletons()


def skeleton(cfg: ModelConfig) -> GPT:
    """Return a GPT of this config without storage, in eval mode, for `functional_call`.

    It is shared by the callers of a thread: call it, but never change it. It is kept in a plain
    dict because a tracing compiler looks through `functools.cache` and would build a new one.
    """
    known = _skeletons.of
    if cfg not in known:
        # A separate thread is outside all transforms: `vmap` would reject the draw of initial
        # weights, although they have no values, and `grad` would wrap the parameters.
        with ThreadPoolExecutor(1) as outside:
            known[cfg] = outside.submit(_build_skeleton, cfg).result()
    return known[cfg]


def _build_skeleton(cfg: ModelConfig) -> GPT:
    return without_storage(cfg).eval()


def without_storage(cfg: ModelConfig) -> GPT:
    """Build a GPT on the meta device, without random draws."""
    with torch.device("meta"), _NoInit():
        return GPT(cfg)


class _NoInit(TorchFunctionMode):
    """Skips `torch.nn.init`.

    Tensors without storage have no values to initialise, and drawing them would import torch's
    compiler, which takes seconds and needs a writable temporary folder.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
