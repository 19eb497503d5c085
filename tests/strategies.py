"""Shared Hypothesis strategies: valid values, small enough to train on."""

from hypothesis import strategies as st

from niels_gpt.config import INITS, OPTIMIZERS, SOURCE_NAMES, ModelConfig, TrainConfig


@st.composite
def model_configs(draw, *, dropout=None, V=256):
    """Legal model shapes of a few thousand parameters; `dropout` pins the rate."""
    H = draw(st.integers(1, 3))
    return ModelConfig(
        V=V,
        T=draw(st.integers(1, 12)),
        C=H * draw(st.sampled_from([2, 4, 6])),
        L=draw(st.integers(1, 2)),
        H=H,
        d_ff=draw(st.integers(1, 16)),
        dropout=draw(st.floats(0, 0.9)) if dropout is None else dropout,
        rope_theta=draw(st.floats(1.0, 1e6)),
    )


def probabilities(names=("wiki", "roam", "primer")):
    """Return a strategy for dicts over some of `names` that sum to 1 up to rounding."""
    weights = st.dictionaries(st.sampled_from(names), st.integers(0, 1000), min_size=1)
    return weights.filter(lambda w: sum(w.values()) > 0).map(
        lambda w: {name: weight / sum(w.values()) for name, weight in w.items()}
    )


@st.composite
def train_configs(draw, *, max_steps=20):
    """Legal training configs of at most `max_steps` updates."""
    counts = st.integers(1, max_steps)
    min_lr, base_lr = sorted(draw(st.tuples(st.floats(0, 0.1), st.floats(0, 0.1))))
    return TrainConfig(
        seed=draw(st.integers(0, 2**63 - 1)),
        B=draw(st.integers(1, 4)),
        total_steps=draw(counts),
        eval_every=draw(counts),
        eval_steps=draw(st.integers(1, 3)),
        log_every=draw(counts),
        ckpt_every=draw(counts),
        base_lr=base_lr,
        warmup_steps=draw(st.integers(0, 2 * max_steps)),
        min_lr=min_lr,
        grad_clip=draw(st.floats(0.01, 100)),
        weight_decay=draw(st.floats(0, 1)),
        p_train=draw(probabilities()),
        optimizer=draw(st.sampled_from(OPTIMIZERS)),
        init=draw(st.sampled_from(INITS)),
        val_source=draw(st.sampled_from(SOURCE_NAMES)),
    )


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**99), 10**99)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
