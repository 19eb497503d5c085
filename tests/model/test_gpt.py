"""The whole model: against plain formulas, causal to the bit, and an ordinary module."""

import copy
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.modules.module import register_module_forward_pre_hook

from niels_gpt import ModelConfig, TrainConfig, make_state, to_modules
from niels_gpt.loss import forward
from niels_gpt.model import GPT, dropout
from niels_gpt.model.blocks import Block
from niels_gpt.model.gpt import skeleton
from tests import reference
from tests.strategies import model_configs
from tests.training import PLAIN, SMALL, random_ids, same_bits, trained_state


def uneven(cfg, seed=0):
    """Return a model in eval mode with every weight random, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(cfg).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


@given(model_configs(V=30), st.integers(1, 3), st.integers(0, 2**32))
def test_logits_are_those_of_the_plain_formulas(cfg, B, seed):
    model, x = uneven(cfg, seed), random_ids(B, cfg.T, seed=seed, V=cfg.V)
    expected = reference.logits(weights(model), x, cfg)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T", [1, 63, 64, 65, 150])
def test_long_contexts_too(T):
    cfg = dataclasses.replace(PLAIN, T=150)
    model, x = uneven(cfg), random_ids(2, T)
    expected = reference.logits(weights(model), x, cfg)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@given(model_configs(V=30), st.integers(1, 3), st.integers(0, 2**32))
def test_dropout_acts_where_the_contract_says(cfg, B, seed):
    model, x = uneven(cfg, seed), random_ids(B, cfg.T, seed=seed, V=cfg.V)
    drop = dropout.dropout_keys(seed, 0, range(B), dropout.sites(cfg.L))
    expected = reference.logits(weights(model), x, cfg, drop)
    scale = 1 / dropout.keep_rate(cfg.dropout)
    torch.testing.assert_close(model(x, drop=drop), expected, rtol=1e-4, atol=1e-4 * scale)


@given(st.integers(0, 149), st.integers(1, 255), st.integers(0, 2**32))
def test_a_byte_leaves_earlier_logits_alone_to_the_bit(t, change, seed):
    model, x = causal_model(), random_ids(1, 150, seed=seed)
    other = x.clone()
    other[0, t] = (x[0, t] + change) % 256
    with torch.no_grad():
        before, after = model(x), model(other)
    assert same_bits(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


def causal_model():
    return uneven(dataclasses.replace(PLAIN, T=150))


def test_every_byte_reaches_every_later_logit():
    model, x = causal_model(), random_ids(1, 130)
    for t in (0, 64, 100):
        other = x.clone()
        other[0, t] += 1
        moved = (model(x) != model(other % 256))[0].any(-1)
        assert moved[t:].all()


@given(st.integers(1, 150), st.integers(0, 2**32))
def test_a_shorter_input_gives_the_same_logits(t, seed):
    model, x = causal_model(), random_ids(2, 150, seed=seed)
    with torch.no_grad():
        torch.testing.assert_close(model(x[:, :t]), model(x)[:, :t], rtol=1e-4, atol=1e-4)


def test_rows_do_not_see_each_other():
    model, x = uneven(PLAIN), random_ids(4, 12)
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]))


@pytest.mark.parametrize("shape", [(2, 13), (12,), (1, 2, 12)])
def test_ids_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="T <= 12"):
        GPT(PLAIN)(torch.zeros(shape, dtype=torch.long))


@given(model_configs())
def test_names_and_shapes_are_the_contract(cfg):
    V, C = cfg.V, cfg.C
    expected = {"tok_emb.weight": (V, C)}
    for i in range(cfg.L):
        block = {n: tuple(p.shape) for n, p in Block(cfg).named_parameters()}
        expected |= {f"blocks.{i}.{n}": shape for n, shape in block.items()}
    expected |= {"ln_f.weight": (C,), "ln_f.bias": (C,), "lm_head.weight": (V, C)}
    model = GPT(cfg)
    assert {n: tuple(p.shape) for n, p in model.state_dict().items()} == expected
    assert [n for n, _ in model.named_parameters()] == list(expected)[:-1]
    assert list(model.buffers()) == []
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.ln_f.eps == 1e-5


def test_the_output_layer_is_the_embedding_and_stays_so():
    model = GPT(SMALL)
    other = GPT(SMALL)
    other.load_state_dict(model.state_dict())
    for m in (model, other, copy.deepcopy(model), to_modules(trained_state())[0]):
        assert m.lm_head.weight is m.tok_emb.weight


def test_a_state_dict_carries_the_function():
    model, other, x = uneven(SMALL), GPT(SMALL).eval(), random_ids(2, 12)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))


def test_train_drops_from_the_global_generator_and_eval_does_not():
    model, x = uneven(SMALL), random_ids(2, 12)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, second = model.train()(x), model(x)
        torch.manual_seed(1)
        assert torch.equal(model(x), first)
        assert not torch.equal(first, second)
        state = torch.get_rng_state()
        assert torch.equal(model.eval()(x), model(x))
        assert torch.equal(torch.get_rng_state(), state)


def test_a_plain_module_learns_with_a_plain_optimizer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, ids = GPT(PLAIN), random_ids(4, 13, V=8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        losses = []
        for _ in range(20):
            out = model(ids[:, :-1]).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(out, ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0] == pytest.approx(5.55, abs=0.1)  # ln 256
    assert losses[-1] < losses[0] - 1


def test_keys_decide_the_dropout_whatever_the_mode():
    model, x = uneven(SMALL), random_ids(2, 12)
    drop = dropout.dropout_keys(5, 0, range(2), dropout.sites(SMALL.L))
    assert torch.equal(model.train()(x, drop=drop), model.eval()(x, drop=drop))
    assert not torch.equal(model(x, drop=drop), model(x))


def test_a_model_uses_each_of_its_sites_once(monkeypatch):
    seen = []

    def spy(key, shape, p, *, start=0):
        seen.append(tuple(key.flatten().tolist()))
        return scaled_mask(key, shape, p, start=start)

    scaled_mask = dropout.scaled_mask
    monkeypatch.setattr(dropout, "scaled_mask", spy)
    drop = dropout.dropout_keys(5, 0, range(1), dropout.sites(SMALL.L))
    GPT(SMALL)(random_ids(1, 12), drop=drop)
    assert seen == [tuple(key.tolist()) for key in drop[0]]


def test_as_a_plain_module_it_drops_at_the_same_sites(monkeypatch):
    """By torch's own dropout: the embedding, and in each block the attention and both branches."""
    seen = []

    def spy(x, p=0.5, training=True):
        seen.append((tuple(x.shape), p, training))
        return x

    monkeypatch.setattr(F, "dropout", spy)
    cfg = dataclasses.replace(SMALL, dropout=0.3)
    GPT(cfg).train()(random_ids(2, 12))
    attention, branch = (2, cfg.H, 12, 12), (2, 12, cfg.C)
    assert seen == [(shape, 0.3, True) for shape in (branch, *[attention, branch, branch] * cfg.L)]
    seen.clear()
    GPT(cfg).eval()(random_ids(2, 12))
    assert not seen


def test_building_a_skeleton_touches_no_generator_and_no_memory():
    cfg = dataclasses.replace(SMALL, V=65_536, C=4096, d_ff=16)
    state = torch.get_rng_state()
    assert {p.device.type for p in skeleton(cfg).parameters()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), state)


def test_concurrent_calls_do_not_see_each_others_weights():
    """Two threads meet inside every block, so that both calls run at the same time."""
    x, meet = random_ids(2, 12), threading.Barrier(2)
    all_params = [make_state(PLAIN, TrainConfig(seed=seed)).params for seed in (1, 2)]
    expected = [forward(params, x, PLAIN) for params in all_params]

    def wait_for_the_other(module, args):
        if isinstance(module, Block):
            meet.wait(timeout=60)

    hook = register_module_forward_pre_hook(wait_for_the_other)
    try:
        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(lambda params: forward(params, x, PLAIN), all_params))
    finally:
        hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_missing_or_unknown_weight_is_an_error():
    params, x = trained_state(steps=0).params, random_ids(1, 12)
    with pytest.raises(RuntimeError, match=r"ln_f\.bias"):
        forward({n: p for n, p in params.items() if n != "ln_f.bias"}, x, SMALL)
    with pytest.raises(RuntimeError, match="ln_g"):
        forward({**params, "ln_g.bias": params["ln_f.bias"]}, x, SMALL)


def test_the_defaults_are_three_million_parameters():
    assert sum(p.numel() for p in skeleton(ModelConfig()).parameters()) == 3_220_992
