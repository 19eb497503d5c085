"""Attention, MLP and block: against plain formulas, and where dropout enters."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt import ModelConfig
from niels_gpt.model import dropout, rope
from niels_gpt.model.blocks import MLP, Block, CausalSelfAttention, init_weights, prefixes
from tests import reference
from tests.strategies import model_configs

CFG = ModelConfig(T=200, C=16, L=1, H=2, d_ff=24, dropout=0.3)
LENGTHS = [1, 2, 63, 64, 65, 128, 130]  # around the blocks of 64 queries


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention(cfg=CFG, seed=0):
    """An attention in eval mode, its weights large enough for uneven probabilities."""
    module = CausalSelfAttention(cfg).eval()
    with torch.no_grad():
        module.qkv.weight.copy_(normal(3 * cfg.C, cfg.C, seed=seed))
        module.proj.weight.copy_(normal(cfg.C, cfg.C, seed=seed + 1))
    return module


def row_keys(B, seed=3):
    return dropout.dropout_keys(seed, 0, range(B), 4)


@pytest.mark.parametrize("T", LENGTHS)
def test_attention_equals_the_fused_one(T):
    module, x = attention(), normal(2, T, CFG.C)
    expected = reference.attention(x, module.qkv.weight, module.proj.weight, CFG)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


@given(model_configs(), st.integers(1, 3), st.integers(0, 2**32))
def test_attention_of_any_shape_equals_the_fused_one(cfg, B, seed):
    module, x = attention(cfg, seed), normal(B, cfg.T, cfg.C, seed=seed)
    expected = reference.attention(x, module.qkv.weight, module.proj.weight, cfg)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T", LENGTHS)
def test_probabilities_are_causal_and_sum_to_one(T):
    module, x = attention(), normal(2, T, CFG.C)
    y, attn = module(x, return_attn=True)
    assert attn.shape == (2, CFG.H, T, T)
    assert torch.equal(y, module(x))
    assert not attn.triu(1).any()
    assert (attn >= 0).all()
    torch.testing.assert_close(attn.sum(-1), torch.ones(2, CFG.H, T))
    assert torch.equal(attn[..., 0, 0], torch.ones(2, CFG.H))


def test_probabilities_are_those_that_weigh_the_values():
    module, x = attention(), normal(2, 100, CFG.C)
    y, attn = module(x, return_attn=True)
    v = module.qkv(x).chunk(3, -1)[2].unflatten(-1, (CFG.H, -1)).transpose(1, 2)
    expected = module.proj((attn @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_probabilities_are_returned_before_dropout():
    module, x = attention(), normal(2, 70, CFG.C)
    y, attn = module(x, return_attn=True)
    keyed_y, keyed = module(x, return_attn=True, drop=row_keys(2)[:, 0])
    plain_y, plain = module.train()(x, return_attn=True)
    assert torch.equal(attn, keyed)
    assert torch.equal(attn, plain)
    assert not torch.equal(y, keyed_y)
    assert not torch.equal(y, plain_y)


@pytest.mark.parametrize("T", [5, 64])
def test_dropout_acts_on_the_probabilities(T):
    module, x, key = attention(), normal(3, T, CFG.C), row_keys(3)[:, 0]
    weights = module.qkv.weight, module.proj.weight
    expected = reference.masked_attention(x, *weights, CFG, key)
    torch.testing.assert_close(module(x, drop=key), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T", [64, 65, 127, 200])
def test_no_two_blocks_of_queries_share_a_draw(T, monkeypatch):
    drawn = []

    def spy(key, shape, p, *, start=0):
        drawn.append(range(start, start + math.prod(shape)))
        return scaled_mask(key, shape, p, start=start)

    scaled_mask = dropout.scaled_mask
    monkeypatch.setattr(dropout, "scaled_mask", spy)
    attention()(normal(1, T, CFG.C), drop=row_keys(1)[:, 0])
    assert len(drawn) == math.ceil(T / 64)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(drawn))


@pytest.mark.parametrize("stops", [(5,), (2, 4, 5), (1, 2, 3, 4, 5)])
def test_prefixes_are_slices_in_every_derivative(stops):
    x = normal(2, 3, 5, 2).double().requires_grad_()

    def weighted(x):
        return tuple(part.square() * (i + 1) for i, part in enumerate(prefixes(x, stops)))

    for part, stop in zip(prefixes(x, stops), stops, strict=True):
        assert torch.equal(part, x[..., :stop, :])
    assert torch.autograd.gradcheck(weighted, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(weighted, (x,))
    each = torch.func.vmap(lambda x: prefixes(x, stops))(x)
    assert all(torch.equal(a, b) for a, b in zip(each, prefixes(x, stops), strict=True))


@pytest.mark.parametrize("tables", [None, rope.rope_cache(200, CFG.C // CFG.H)])
def test_rope_is_called_once_through_its_module(tables, monkeypatch):
    calls = []

    def spy(*args):
        calls.append(args)
        return apply_rope(*args)

    apply_rope = rope.apply_rope
    module, x = attention(), normal(2, 130, CFG.C)
    expected = module(x)
    monkeypatch.setattr(rope, "apply_rope", spy)
    assert torch.equal(module(x, tables=tables), expected)
    assert len(calls) == 1


def test_attention_takes_its_base_from_the_config():
    x = normal(1, 20, CFG.C)
    cfg = ModelConfig(**{**vars(CFG), "rope_theta": 10.0})
    assert not torch.allclose(attention(cfg)(x), attention(CFG)(x))


@given(model_configs())
def test_names_and_shapes_are_the_contract(cfg):
    C, d_ff = cfg.C, cfg.d_ff
    attn = {"qkv.weight": (3 * C, C), "proj.weight": (C, C)}
    mlp = {
        "fc1.weight": (d_ff, C),
        "fc1.bias": (d_ff,),
        "fc2.weight": (C, d_ff),
        "fc2.bias": (C,),
    }
    norms = {f"ln{i}.{part}": (C,) for i in (1, 2) for part in ("weight", "bias")}
    expected = norms | {f"attn.{n}": s for n, s in attn.items()}
    expected |= {f"mlp.{n}": s for n, s in mlp.items()}
    assert {n: tuple(p.shape) for n, p in Block(cfg).state_dict().items()} == expected
    assert Block(cfg).ln1.eps == Block(cfg).ln2.eps == 1e-5


def test_the_mlp_has_an_exact_gelu_in_its_middle():
    mlp, x = MLP(CFG), normal(3, CFG.C) * 30
    middle = (x @ mlp.fc1.weight.T + mlp.fc1.bias).tolist()
    gelu = torch.tensor([[u * (1 + math.erf(u / 2**0.5)) / 2 for u in row] for row in middle])
    torch.testing.assert_close(mlp(x), gelu @ mlp.fc2.weight.T + mlp.fc2.bias)


def test_a_block_adds_each_branch_to_its_input():
    block, x = Block(CFG).eval(), normal(2, 70, CFG.C)
    h = x + block.attn(block.ln1(x))
    expected = h + block.mlp(block.ln2(h))
    torch.testing.assert_close(block(x), expected)
    y, attn = block(x, return_attn=True)
    assert torch.equal(y, block(x))
    assert torch.equal(attn, block.attn(block.ln1(x), return_attn=True)[1])


def test_a_block_drops_each_branch_once_under_its_own_key():
    block, x, keys = Block(CFG).eval(), normal(2, 30, CFG.C), row_keys(2)[:, :3]
    a = block.attn(block.ln1(x), drop=keys[:, 0])
    h = x + reference.dropped(a, keys[:, 1], CFG.dropout)
    expected = h + reference.dropped(block.mlp(block.ln2(h)), keys[:, 2], CFG.dropout)
    torch.testing.assert_close(block(x, drop=keys), expected)
    assert torch.equal(block.train()(x, drop=keys), block.eval()(x, drop=keys))


def test_without_keys_a_module_behaves_like_any_other():
    block, x = Block(CFG), normal(2, 30, CFG.C)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, second = block.train()(x), block(x)
        torch.manual_seed(1)
        assert torch.equal(block(x), first)
        assert not torch.equal(first, second)
        state = torch.get_rng_state()
        assert torch.equal(block.eval()(x), block(x))
        assert not torch.equal(block(x), first)
        assert torch.equal(torch.get_rng_state(), state)


def test_keys_leave_the_global_generator_alone():
    block, x = Block(CFG).train(), normal(2, 70, CFG.C)
    state = torch.get_rng_state()
    block(x, drop=row_keys(2)[:, :3])
    assert torch.equal(torch.get_rng_state(), state)


def test_first_weights_are_normal_with_deviation_a_fiftieth():
    block = Block(ModelConfig(C=64, H=2, d_ff=200)).apply(init_weights)
    for name, p in block.named_parameters():
        if p.ndim == 2:
            n = p.numel()
            assert abs(p.mean()) < 5 * 0.02 / n**0.5
            assert p.std().item() == pytest.approx(0.02, rel=5 / (2 * n) ** 0.5)
            assert 0.9 < (p.square().mean() ** 2 * 3 / p.pow(4).mean()) < 1.1  # kurtosis 3
        else:
            assert torch.equal(p, torch.ones_like(p) * float("ln" in name and "weight" in name))


def test_first_weights_come_from_the_generator_given():
    state = torch.get_rng_state()
    one, two, three = (torch.nn.Linear(4, 4).requires_grad_(False) for _ in range(3))
    torch.set_rng_state(state)
    for module, seed in ((one, 1), (two, 1), (three, 2)):
        init_weights(module, torch.Generator().manual_seed(seed))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, three.weight)


def test_probabilities_stay_finite_for_large_scores():
    module, x = attention(), normal(2, 70, CFG.C) * 1e6
    _, attn = module(x, return_attn=True)
    torch.testing.assert_close(attn.sum(-1), torch.ones(2, CFG.H, 70))
    assert (attn.amax(-1) > 0.99).float().mean() > 0.9
