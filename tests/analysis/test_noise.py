"""The gradient noise scale, against a computation without tricks on a tiny model."""

import math

import pytest
import torch

from niels_gpt.analysis import noise
from niels_gpt.corpus import Corpus
from niels_gpt.loss import gradients
from niels_gpt.model.dropout import dropout_keys, sites
from niels_gpt.optim.trees import to_vector
from tests.analysis.plain import STREAM, TINY, row_gradients
from tests.training import SMALL, copy_of, random_batch, same_state, trained_state


def test_row_products_are_those_of_the_gradients_of_single_rows(state):
    x, y = random_batch(9, 8, V=16)
    squares, products = noise.row_products(state.params, (x, y), TINY)
    g = row_gradients(state, x, y)
    torch.testing.assert_close(torch.tensor(squares), g.square().sum(1), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(torch.tensor(products), g @ g.mean(0), rtol=1e-4, atol=1e-7)


def test_row_products_take_the_dropout_of_each_row():
    state = trained_state(SMALL)
    x, y = random_batch(3)
    drop = dropout_keys(1, 2, range(3), sites(SMALL.L))
    squares, products = noise.row_products(state.params, (x, y), SMALL, drop)
    rows = [gradients(state.params, (x[i:][:1], y[i:][:1]), SMALL, drop[i:][:1]) for i in range(3)]
    g = torch.stack([to_vector(grads) for grads, _ in rows])
    torch.testing.assert_close(torch.tensor(squares), g.square().sum(1), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(torch.tensor(products), g @ g.mean(0), rtol=1e-4, atol=1e-7)


def test_the_noise_scale_is_trace_over_square_without_bias(state):
    x, y = random_batch(9, 8, V=16)
    found = noise.noise_scale(*noise.row_products(state.params, (x, y), TINY))
    g = row_gradients(state, x, y)
    covariance = torch.cov(g.T)
    assert math.isclose(found.variance, covariance.trace().item(), rel_tol=1e-3)
    signal = (g.mean(0).square().sum() - covariance.trace() / 9).item()
    assert math.isclose(found.signal, signal, rel_tol=1e-2, abs_tol=1e-6)
    between = [(g[i] @ g[j]).item() for i in range(9) for j in range(9) if i != j]
    assert math.isclose(found.signal, sum(between) / 72, rel_tol=1e-2, abs_tol=1e-6)


def products_of(g):
    return g.square().sum(1).tolist(), (g @ g.mean(0)).tolist()


def test_the_interval_uses_what_each_left_out_row_gives():
    g = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) + 1.0
    without = []
    for i in range(12):
        rest = torch.cat((g[:i], g[i + 1 :]))
        s = noise.noise_scale(*products_of(rest))
        without.append((s.variance, s.signal))
    whole = noise.noise_scale(*products_of(g))
    wanted = noise._ratio_interval(whole.variance, whole.signal, *noise._jackknife(without))
    assert [whole.low, whole.high] == pytest.approx(wanted, rel=1e-3)


def test_the_interval_covers_a_known_noise_scale_about_95_times_in_100():
    """Gaussian gradients of 40 parameters, |G|^2 = 1, tr(Sigma) = 40 * 0.25 = 10."""
    generator = torch.Generator().manual_seed(7)
    G = torch.ones(40) / 40**0.5
    covered, middle = 0, []
    for _ in range(200):
        g = G + 0.5 * torch.randn(64, 40, generator=generator)
        found = noise.noise_scale(*products_of(g))
        covered += found.low <= 10.0 <= found.high
        middle.append(found.scale)
        assert found.low <= found.scale <= found.high
    assert 180 <= covered <= 199
    assert 9.5 < sorted(middle)[100] < 10.5


def test_where_both_small_and_large_ratios_are_possible_the_interval_has_them():
    """Fieller's set is then all but a stretch of positive ratios: it begins at 0."""
    assert noise._ratio_interval(1.0, 0.5, 0.3, 0.3, 0.299) == (0.0, math.inf)


def test_pure_noise_has_no_upper_end():
    g = torch.randn(64, 40, generator=torch.Generator().manual_seed(1))
    found = noise.noise_scale(*products_of(g))
    assert found.high == math.inf
    with pytest.raises(ValueError, match="3 rows"):
        noise.noise_scale([1.0, 1.0], [1.0, 1.0])


def test_next_rows_are_the_next_batches_of_the_run():
    from niels_gpt.step import batch_of_step, dropout_of_step

    state = trained_state(SMALL, B=2)
    corpus = Corpus({"wiki": STREAM}, {}, {"wiki": 1.0}, seed=42, B=2, T=12)
    (x, y), drop = noise.next_rows(state, corpus, 3)
    for i in range(3):
        wanted = batch_of_step(42, 3 + i, corpus.train, p=corpus.p, B=2, T=12)
        assert torch.equal(x[2 * i : 2 * i + 2], wanted[0])
        assert torch.equal(y[2 * i : 2 * i + 2], wanted[1])
        keys = dropout_of_step(42, 3 + i, range(2), SMALL)
        assert torch.equal(drop[2 * i : 2 * i + 2], keys)


def test_nothing_is_changed(state):
    before = copy_of(state)
    noise.row_products(state.params, random_batch(3, 8, V=16), TINY)
    assert same_state(state, before)
