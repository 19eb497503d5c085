"""Small models, batches and comparisons for the tests of the functional core."""

import pytest
import torch
from torch import Tensor

from niels_gpt import ModelConfig, TrainConfig, TrainState, make_state, train_step
from niels_gpt.loss import Batch
from niels_gpt.optim.trees import map_tensors

SMALL = ModelConfig(T=12, C=16, L=2, H=2, d_ff=24, dropout=0.2)
PLAIN = ModelConfig(T=12, C=16, L=2, H=2, d_ff=24, dropout=0.0)

ACCELERATORS = [
    pytest.param(
        name,
        marks=[
            *([pytest.mark.mps] if name == "mps" else []),
            pytest.mark.skipif(not getattr(torch, name).is_available(), reason=f"needs {name}"),
        ],
    )
    for name in ("mps", "cuda")
]


def random_ids(*shape: int, seed: int = 0, V: int = 256) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def random_batch(B: int = 4, T: int = 12, *, seed: int = 0, V: int = 256) -> Batch:
    """Return x and y, each (B, T), of random ids."""
    ids = random_ids(B, T + 1, seed=seed, V=V)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def trained_state(model_cfg: ModelConfig = SMALL, *, steps: int = 3, **train: object) -> TrainState:
    """Return a state whose moments are not zero, nor its weights near their first values."""
    state = make_state(model_cfg, TrainConfig(**train))
    for step in range(steps):
        batch = random_batch(T=model_cfg.T, seed=step, V=model_cfg.V)
        state, _ = train_step(state, batch, 0.01)
    return state


def tensors(state: TrainState) -> dict[str, Tensor]:
    """Return all tensors of a state under one name each, e.g. "params/ln_f.bias"."""
    trees = state.trees()
    return {f"{tree}/{name}": t for tree in trees for name, t in trees[tree].items()}


def copy_of(state: TrainState) -> TrainState:
    """Return a copy of this state that shares no storage with it."""
    return map_tensors(torch.clone, state)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors agree in dtype, shape and every bit (0.0 is not -0.0)."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.dtype == torch.float32:
        a, b = a.contiguous().view(torch.int32), b.contiguous().view(torch.int32)
    return torch.equal(a, b)


def same_state(a: TrainState, b: TrainState) -> bool:
    """Return whether two states agree bit for bit."""
    one, other = tensors(a), tensors(b)
    return (
        a[2:] == b[2:]
        and list(one) == list(other)
        and all(same_bits(one[name], other[name]) for name in one)
    )


def assert_close_trees(
    a: dict[str, Tensor], b: dict[str, Tensor], *, rtol: float = 1e-4, atol: float = 1e-6
) -> None:
    """Fail unless two trees have the same names and close values."""
    assert a.keys() == b.keys()
    for name in a:
        text = f"{name}: {{}}".format
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=text)
