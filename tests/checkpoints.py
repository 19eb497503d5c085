"""States, payloads and values to be saved in tests."""

import torch
from hypothesis import strategies as st

from niels_gpt.checkpoint import Checkpoint, checkpoint_of, payload_of
from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.eval import Scores
from niels_gpt.optim import optimizer_of
from niels_gpt.optim.trees import map_tensors
from niels_gpt.schema import Payload, parameter_shapes
from niels_gpt.state import TrainState
from tests.strategies import model_configs, train_configs

TINY = ModelConfig(V=16, T=8, C=4, L=1, H=1, d_ff=4, dropout=0.0)


def any_finite_bits(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return float32 of every kind but inf and NaN: denormals, both zeros, the largest."""
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64)
    floats = bits.to(torch.int32).view(torch.float32)
    return torch.where(floats.isfinite(), floats, -0.0)


def random_state(
    model_cfg: ModelConfig = TINY, *, step: int = 3, seed: int = 0, **train: object
) -> TrainState:
    """Return a state of arbitrary finite bits."""
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(model_cfg)
    params = {name: any_finite_bits(shape, generator) for name, shape in shapes.items()}
    opt_state = optimizer_of(TrainConfig(**train)).init(params)
    if step:
        opt_state = map_tensors(lambda t: any_finite_bits(t.shape, generator), opt_state)
    return TrainState(params, opt_state, step, model_cfg, TrainConfig(**train))


def random_payload(model_cfg: ModelConfig = TINY, *, step: int = 3, seed: int = 0) -> Payload:
    """Return what `write_payload` takes."""
    return payload_of(random_checkpoint(model_cfg, step=step, seed=seed))


def random_checkpoint(model_cfg: ModelConfig = TINY, *, step: int = 3, seed: int = 0) -> Checkpoint:
    return checkpoint_of(random_state(model_cfg, step=step, seed=seed), Scores(1.5))


@st.composite
def states(draw: st.DrawFn) -> TrainState:
    train_cfg = draw(train_configs())
    return random_state(
        draw(model_configs(V=draw(st.sampled_from([1, 7, 256])))),
        step=draw(st.integers(0, 2**24)),
        seed=draw(st.integers(0, 2**32)),
        optimizer=train_cfg.optimizer,
    )._replace(train_cfg=train_cfg)


json_scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["cpu", "storage", "0", "10", "latest"])
)
json_like = st.recursive(
    json_scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)
json_objects = st.dictionaries(st.text(max_size=6), json_like, max_size=4)
