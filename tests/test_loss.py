"""The loss and its derivatives: by hand, by blocks of rows, and of second order."""

import dataclasses
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

from niels_gpt import loss as loss_module
from niels_gpt import to_modules
from niels_gpt.loss import cross_entropy, forward, gradients, loss, rows_per_block
from niels_gpt.model.dropout import dropout_keys, sites
from tests.strategies import model_configs
from tests.training import PLAIN, SMALL, assert_close_trees, random_batch, same_bits, trained_state

# L = 1 and no wide layers, for the tests that differentiate twice or many times
THIN = dataclasses.replace(SMALL, T=6, C=8, L=1, d_ff=8)


def keys(B, cfg=SMALL, step=0):
    return dropout_keys(1, step, range(B), sites(cfg.L))


def direction(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator) * 0.1 for n, p in params.items()}


def dot(a, b):
    return sum((a[name] * b[name]).sum() for name in a)


@given(st.lists(st.lists(st.floats(-50, 50), min_size=3, max_size=3), min_size=2, max_size=2))
def test_cross_entropy_by_hand(rows):
    logits, y = torch.tensor([rows]), torch.tensor([[2, 0]])
    by_hand = [
        math.log(math.fsum(math.exp(score - row[target]) for score in row))
        for row, target in zip(rows, (2, 0), strict=True)
    ]
    assert cross_entropy(logits, y).item() == pytest.approx(sum(by_hand) / 2, abs=1e-4)
    assert cross_entropy(logits, y, "sum").item() == pytest.approx(sum(by_hand), abs=1e-4)


def test_the_loss_is_the_mean_over_all_positions():
    state, (x, y) = trained_state(), random_batch(3)
    logits = forward(state.params, x, SMALL)
    chosen = logits.log_softmax(-1).gather(-1, y[..., None])
    torch.testing.assert_close(loss(state.params, (x, y), SMALL), -chosen.mean())


def test_a_uniform_model_costs_the_logarithm_of_the_vocabulary():
    params = {n: torch.zeros_like(p) for n, p in trained_state(steps=0).params.items()}
    assert loss(params, random_batch(), SMALL).item() == pytest.approx(math.log(256))


@given(model_configs(dropout=0.0), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=15)
def test_gradients_are_those_of_the_module(cfg, B, seed):
    state, (x, y) = trained_state(cfg, steps=1), random_batch(B, cfg.T, seed=seed)
    grads, value = gradients(state.params, (x, y), cfg)
    model, _ = to_modules(state)
    expected = cross_entropy(model(x), y)
    expected.backward()
    torch.testing.assert_close(value, expected.detach())
    assert_close_trees(grads, {n: p.grad for n, p in model.named_parameters()}, atol=1e-5)


@example(B=5, T=4, block=8, dropped=True)  # blocks of 2, 2 and 1 rows
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 60), st.booleans())
@settings(max_examples=15)
def test_blocks_of_rows_change_nothing_but_rounding(B, T, block, dropped):
    params, batch = trained_state().params, random_batch(B, T)
    drop = keys(B) if dropped else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "ROW_BLOCK", 10**9)
        whole_grads, whole = gradients(params, batch, SMALL, drop)
        patch.setattr(loss_module, "ROW_BLOCK", block)
        grads, value = gradients(params, batch, SMALL, drop)
    torch.testing.assert_close(value, whole)
    assert_close_trees(grads, whole_grads)


@given(st.integers(2, 9), st.data())
@settings(max_examples=12)
def test_any_split_by_rows_adds_up_to_the_whole(B, data):
    """Processes that each take a share of the rows, with their keys, make the same step."""
    params, (x, y) = trained_state().params, random_batch(B)
    cuts = data.draw(st.lists(st.integers(1, B - 1), unique=True).map(sorted))
    drop = keys(B)
    whole_grads, whole = gradients(params, (x, y), SMALL, drop)
    total, grads = 0, {n: torch.zeros_like(p) for n, p in params.items()}
    for start, stop in zip([0, *cuts], [*cuts, B], strict=True):
        rows = slice(start, stop)
        own_keys = dropout_keys(1, 0, range(start, stop), sites(SMALL.L))
        part_grads, part = gradients(params, (x[rows], y[rows]), SMALL, own_keys)
        total += part * (stop - start) / B
        grads = {n: g + part_grads[n] * (stop - start) / B for n, g in grads.items()}
    torch.testing.assert_close(total, whole)
    assert_close_trees(grads, whole_grads)


def test_dropout_depends_on_the_keys_alone():
    params, batch = trained_state().params, random_batch()
    values = [loss(params, batch, SMALL, keys(4, step=step)) for step in (0, 0, 1)]
    assert same_bits(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    assert not torch.equal(values[0], loss(params, batch, SMALL))


def test_arguments_are_left_alone():
    params, batch, drop = trained_state().params, random_batch(8), keys(8)
    arguments = [*params.values(), *batch, drop]
    before = [t.clone() for t in arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "ROW_BLOCK", 24)
        grads, _ = gradients(params, batch, SMALL, drop)
    for g in grads.values():
        g.fill_(7.0)
    assert all(same_bits(a, b) for a, b in zip(arguments, before, strict=True))


@given(st.integers(1, 100_000))
def test_a_block_has_at_least_one_row(T):
    rows = rows_per_block(T)
    assert rows >= 1
    assert rows * T <= max(T, loss_module.ROW_BLOCK)
    assert (rows + 1) * T > loss_module.ROW_BLOCK


@pytest.mark.parametrize("dropped", [False, True])
def test_a_directional_derivative_is_the_gradient_along_it(dropped):
    params, batch = trained_state(THIN).params, random_batch(2, THIN.T)
    drop, v = keys(2, THIN) if dropped else None, direction(params, 1)
    grads, value = gradients(params, batch, THIN, drop)
    primal, tangent = jvp(lambda p: loss(p, batch, THIN, drop), (params,), (v,))
    torch.testing.assert_close(primal, value)
    torch.testing.assert_close(tangent, dot(grads, v), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dropped", [False, True])
def test_hessian_times_vector_agrees_by_both_ways_and_is_symmetric(dropped):
    params, batch = trained_state(THIN).params, random_batch(2, THIN.T)
    drop = keys(2, THIN) if dropped else None
    u, v = direction(params, 1), direction(params, 2)

    def gradient(p):
        return grad(loss)(p, batch, THIN, drop)

    def hessian_times(w):
        return jvp(gradient, (params,), (w,))[1]

    hv = hessian_times(v)
    twice_reversed = grad(lambda p: dot(gradient(p), v))(params)
    assert_close_trees(hv, twice_reversed, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(dot(u, hv), dot(v, hessian_times(u)), rtol=1e-3, atol=1e-4)
    eps = 0.05
    ahead, behind = (
        gradient({n: p + sign * eps * v[n] for n, p in params.items()}) for sign in (1, -1)
    )
    slope = {n: (ahead[n] - behind[n]) / (2 * eps) for n in params}
    assert dot(slope, hv) > 0.99 * (dot(slope, slope) * dot(hv, hv)) ** 0.5


def test_gradients_in_blocks_can_be_differentiated_again():
    params, batch, drop = trained_state(THIN).params, random_batch(4, THIN.T), keys(4, THIN)
    v = direction(params, 3)
    whole = jvp(lambda p: grad(loss)(p, batch, THIN, drop), (params,), (v,))[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "ROW_BLOCK", 2 * THIN.T)
        blocks = jvp(lambda p: gradients(p, batch, THIN, drop)[0], (params,), (v,))[1]
    assert_close_trees(blocks, whole, rtol=1e-3, atol=1e-5)


def test_per_row_gradients_by_vmap_average_to_the_gradient():
    params, (x, y), drop = trained_state(THIN).params, random_batch(5, THIN.T), keys(5, THIN)

    def of_row(x, y, drop):
        return grad(loss)(params, (x[None], y[None]), THIN, drop[None])

    rows = vmap(of_row)(x, y, drop)
    expected, _ = gradients(params, (x, y), THIN, drop)
    assert_close_trees({n: g.mean(0) for n, g in rows.items()}, expected, rtol=1e-3)


def test_a_context_shorter_than_the_configs():
    params = trained_state(PLAIN).params
    x, y = random_batch(2, 5)
    shorter = dataclasses.replace(PLAIN, T=5)
    assert same_bits(loss(params, (x, y), PLAIN), loss(params, (x, y), shorter))
