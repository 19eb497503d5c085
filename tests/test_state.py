"""The state: its first value, and the way to modules and back without loss."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from niels_gpt import (
    ModelConfig,
    TrainConfig,
    TrainState,
    config,
    from_modules,
    make_state,
    to_modules,
)
from niels_gpt.loss import cross_entropy
from niels_gpt.model import GPT, gpt
from niels_gpt.step import train_step
from tests.strategies import model_configs, train_configs
from tests.training import (
    PLAIN,
    SMALL,
    assert_close_trees,
    copy_of,
    random_batch,
    same_bits,
    same_state,
    tensors,
    trained_state,
)


def imperative_step(model, optimizer, batch, *, lr, grad_clip=1.0):
    """Update in place the way a plain loop does; return the loss and the norm of the gradient."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss = cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    return loss.detach(), norm


def test_a_state_is_what_the_next_step_needs():
    assert TrainState._fields == ("params", "opt_state", "step", "model_cfg", "train_cfg")


@given(model_configs(), train_configs())
@settings(max_examples=15)
def test_the_first_state(model_cfg, train_cfg):
    state = make_state(model_cfg, train_cfg)
    assert state[2:] == (0, model_cfg, train_cfg)
    names = [name for name, _ in GPT(model_cfg).named_parameters()]
    assert list(state.params) == names
    for tree in state.trees().values():
        assert list(tree) == [name for name in names if name in tree]
    for name, t in tensors(state).items():
        assert t.dtype == torch.float32
        assert t.is_contiguous()
        assert not t.requires_grad
        assert name.startswith("params/") or not t.any()
    assert len({t.data_ptr() for t in tensors(state).values()}) == len(tensors(state))


@given(model_configs(), train_configs())
@settings(max_examples=15)
def test_the_seed_alone_decides_the_first_weights(model_cfg, train_cfg):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        one = make_state(model_cfg, train_cfg)
        torch.manual_seed(2)
        assert same_state(make_state(model_cfg, train_cfg), one)
    other_seed = TrainConfig(**{**vars(train_cfg), "seed": train_cfg.seed ^ 1})
    other = make_state(model_cfg, other_seed)
    assert not same_bits(other.params["tok_emb.weight"], one.params["tok_emb.weight"])


def test_the_number_of_threads_does_not():
    threads = torch.get_num_threads()
    try:
        states = []
        for n in (1, 2):
            torch.set_num_threads(n)
            states.append(make_state(ModelConfig(L=1), TrainConfig()))
    finally:
        torch.set_num_threads(threads)
    assert same_state(*states)


def test_global_generators_are_left_alone():
    before = torch.get_rng_state(), random.getstate()
    state = make_state(SMALL, TrainConfig())
    model, optimizer = to_modules(state)
    from_modules(model, optimizer, state.train_cfg)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_first_weights_are_normal_with_deviation_a_fiftieth():
    for name, p in make_state(ModelConfig(C=128, H=4, L=1, d_ff=256), TrainConfig()).params.items():
        if p.ndim == 2:
            assert abs(p.mean()) < 5 * 0.02 / p.numel() ** 0.5, name
            assert p.std().item() == pytest.approx(0.02, rel=5 / (2 * p.numel()) ** 0.5), name
        else:
            assert torch.equal(p, torch.full_like(p, float("ln" in name and "weight" in name)))


def test_first_weights_by_fan_in():
    """In the blocks of variance 1 / fan-in, nothing into the residual stream, the same logits."""
    cfg = ModelConfig(C=128, H=4, L=2, d_ff=256)
    normal = make_state(cfg, TrainConfig()).params
    for name, p in make_state(cfg, TrainConfig(init="fan_in")).params.items():
        if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
            assert not p.any(), name
        elif name.endswith(("attn.qkv.weight", "mlp.fc1.weight")):
            expected, loose = 128**-0.5, 5 / (2 * p.numel()) ** 0.5
            assert p.std().item() == pytest.approx(expected, rel=loose), name
        elif name == "tok_emb.weight":
            torch.testing.assert_close(p, 10 * normal[name])
        elif name == "ln_f.weight":
            torch.testing.assert_close(p, normal[name] / 10)
        else:
            assert same_bits(p, normal[name]), name


def test_every_initialisation_of_a_config_is_known():
    assert tuple(gpt.INITS) == config.INITS


@pytest.mark.parametrize("init", config.INITS)
def test_first_weights_of_different_tensors_are_different(init):
    params = make_state(SMALL, TrainConfig(init=init)).params.values()
    firsts = [tuple(p.flatten()[:8].tolist()) for p in params if p.ndim == 2 and p.any()]
    assert len(set(firsts)) == len(firsts) > 4


def test_first_weights_never_change():
    """A seed names the same run in every version."""
    weight = make_state(SMALL, TrainConfig(seed=1)).params["blocks.1.mlp.fc1.weight"]
    assert weight[0, :3].tolist() == pytest.approx(FIRST_WEIGHTS, rel=1e-4)


FIRST_WEIGHTS = [0.01511429, -0.00566634, -0.01281935]


def test_a_state_can_be_made_on_a_device():
    state = make_state(SMALL, TrainConfig(), device="meta")
    assert {t.device.type for t in tensors(state).values()} == {"meta"}


# --- modules ------------------------------------------------------------------------------------


@given(model_configs(), train_configs(), st.integers(0, 2))
@settings(max_examples=15)
def test_to_modules_and_back_is_the_identity(model_cfg, train_cfg, steps):
    state = make_state(model_cfg, train_cfg)
    for k in range(steps):
        state, _ = train_step(state, random_batch(2, model_cfg.T, seed=k), 0.01)
    assert same_state(from_modules(*to_modules(state), train_cfg), state)


def test_modules_share_nothing_with_the_state():
    state = trained_state()
    before = copy_of(state)
    model, optimizer = to_modules(state)
    imperative_step(model, optimizer, random_batch(), lr=0.1)
    assert same_state(state, before)
    after = from_modules(model, optimizer, state.train_cfg)
    kept = copy_of(after)
    imperative_step(model, optimizer, random_batch(), lr=0.1)
    assert same_state(after, kept)
    assert not same_state(after, before)


def test_the_modules_are_a_gpt_and_a_torch_adamw_of_the_contract():
    model, optimizer = to_modules(trained_state(base_lr=0.007, weight_decay=0.03))
    assert type(model) is GPT
    assert model.cfg == SMALL
    assert model.lm_head.weight is model.tok_emb.weight
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (0.007, (0.9, 0.95), 1e-8)
    assert group["weight_decay"] == 0.03
    assert list(map(id, group["params"])) == list(map(id, model.parameters()))


def test_an_untouched_optimizer_is_a_state_of_no_steps():
    model = GPT(SMALL)
    state = from_modules(model, torch.optim.AdamW(model.parameters()), TrainConfig())
    assert state.step == 0
    assert not any(t.any() for tree in state.opt_state for t in tree.values())


@pytest.mark.parametrize("optimizer", config.OPTIMIZERS)
def test_either_side_continues_the_same_trajectory(optimizer):
    """Convert back and forth every three steps; the plain loop runs alongside."""
    state = make_state(PLAIN, TrainConfig(optimizer=optimizer))
    model, optimizer = to_modules(state)
    for k in range(9):
        batch, lr = random_batch(seed=k), 0.002 * (k + 1)
        imperative_step(model, optimizer, batch, lr=lr)
        if k // 3 == 1:
            sides = to_modules(state)
            imperative_step(*sides, batch, lr=lr)
            state = from_modules(*sides, state.train_cfg)
        else:
            state, _ = train_step(state, batch, lr)
    expected = from_modules(model, optimizer, state.train_cfg)
    assert state.step == expected.step == 9
    assert_close_trees(tensors(state), tensors(expected), rtol=1e-3, atol=2e-5)


def test_parameters_of_different_age_are_refused():
    model, optimizer = to_modules(trained_state())
    optimizer.state[model.ln_f.bias]["step"] += 1
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        from_modules(model, optimizer, TrainConfig())
    del optimizer.state[model.ln_f.bias]
    with pytest.raises(ValueError, match=r"\[0, 3\]"):
        from_modules(model, optimizer, TrainConfig())
