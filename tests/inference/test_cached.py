"""Reading byte by byte is the model's forward pass, for every shape."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from niels_gpt.config import ModelConfig
from niels_gpt.inference.cached import bind, empty_cache, read_first, read_next
from niels_gpt.loss import forward
from niels_gpt.state import empty_model
from tests.strategies import model_configs
from tests.trained import lively_state

VOCABULARIES = st.sampled_from([2, 256, 300])
ALL = slice(None)


def some_ids(cfg, B, n, seed=0):
    return torch.randint(cfg.V, (B, n), generator=torch.Generator().manual_seed(seed))


def read(params, cfg, ids, first):
    """Read `first` ids at once, then the rest one by one; return the cache and all logits."""
    weights, n = bind(params, cfg), ids.shape[1]
    cache = empty_cache(weights, len(ids))
    with torch.no_grad():
        logits = [read_first(weights, ids[:, :first], cache, ALL)]
        logits += [read_next(weights, ids[:, t], cache, t) for t in range(first, n)]
    return cache, torch.stack(logits, dim=1)


@settings(max_examples=150)
@given(
    cfg=VOCABULARIES.flatmap(lambda V: model_configs(V=V)),
    B=st.integers(1, 4),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_it_is_the_models_forward_pass_at_every_position(cfg, B, data, seed):
    n = data.draw(st.integers(1, cfg.T))
    first = data.draw(st.integers(1, n))
    params, ids = lively_state(cfg, seed).params, some_ids(cfg, B, n, seed)
    cache, logits = read(params, cfg, ids, first)
    with torch.no_grad():
        expected = forward(params, ids, cfg)[:, first - 1 :]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(cache.ids[:, :n], ids)


def test_it_is_the_models_where_the_model_attends_in_blocks():
    cfg = ModelConfig(T=200, C=24, L=3, H=2, d_ff=40)
    params, ids = lively_state(cfg).params, some_ids(cfg, 2, 200)
    with torch.no_grad():
        whole = forward(params, ids, cfg)
    for first in (1, 64, 65, 200):
        _, logits = read(params, cfg, ids, first)
        torch.testing.assert_close(logits, whole[:, first - 1 :], rtol=1e-4, atol=1e-4)


def test_keys_and_values_are_the_same_read_at_once_or_one_by_one():
    cfg = ModelConfig(T=70, C=12, L=2, H=2, d_ff=16)
    params, ids = lively_state(cfg).params, some_ids(cfg, 3, 70)
    (one_by_one, _), (at_once, _) = read(params, cfg, ids, 1), read(params, cfg, ids, 70)
    torch.testing.assert_close(one_by_one.kv, at_once.kv, rtol=1e-4, atol=1e-4)


def test_the_weights_are_the_tensors_themselves():
    params = lively_state().params
    weights = bind(params, lively_state().model_cfg)
    tensors = torch.utils._pytree.tree_leaves([weights.tok_emb, weights.blocks, weights.ln_f])
    assert {t.data_ptr() for t in tensors} == {p.data_ptr() for p in params.values()}


def test_a_module_is_read_as_its_parameters_are():
    params, cfg = lively_state().params, lively_state().model_cfg
    model = empty_model(cfg)
    model.load_state_dict({**params, "lm_head.weight": params["tok_emb.weight"]})
    ids = some_ids(cfg, 2, 9)
    assert torch.equal(
        read(dict(model.named_parameters()), cfg, ids, 4)[1], read(params, cfg, ids, 4)[1]
    )


def test_a_fork_has_what_was_seen_and_nothing_of_the_future():
    cfg = ModelConfig(T=8, C=12, L=2, H=2, d_ff=16)
    cache, _ = read(lively_state(cfg).params, cfg, some_ids(cfg, 1, 6), 2)
    fork = cache.fork(4, 3)
    assert fork.filled == 4
    assert fork.kv.shape == (2, 2, 3, 2, 8, 6)
    for i in range(3):
        assert torch.equal(fork.ids[i, :4], cache.ids[0, :4])
        assert torch.equal(fork.kv[:, :, i, :, :4], cache.kv[:, :, 0, :, :4])
    before = cache.kv[..., :4, :].clone()
    fork.kv.zero_()
    assert torch.equal(cache.kv[..., :4, :], before)
