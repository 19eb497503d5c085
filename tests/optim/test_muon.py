"""Muon: the orthogonal factor, and which parameter is updated by which part."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from niels_gpt import ModelConfig, TrainConfig, make_state
from niels_gpt.optim import OPTIMIZERS
from niels_gpt.optim.muon import MOMENTUM, QUINTICS, RMS, orthogonal, polar_factor
from tests.training import same_bits

CFG = ModelConfig(V=16, T=8, C=16, L=2, H=2, d_ff=40)  # square, wide and tall matrices
MUON, ADAMW = OPTIMIZERS["muon"], OPTIMIZERS["adamw"]
SHAPES = [(1, 1), (4, 4), (6, 9), (6, 12), (5, 40), (32, 32), (32, 128)]  # both forms of iteration


def random_params(seed, scale=1.0):
    params = make_state(CFG, TrainConfig()).params
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator) * scale for n, p in params.items()}


def matrices(tree):
    return {n: x for n, x in tree.items() if n in MUON.init(tree).momentum_buffer}


def with_singular_values(values, m, seed=0):
    """Return a matrix (len(values), m), and the factor U V^T of it."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    U, _ = torch.linalg.qr(torch.randn(n, n, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(m, n, generator=generator))
    return (U * values) @ V.mT, U @ V.mT


# --- the factor ---------------------------------------------------------------------------------


def test_the_polynomials_map_a_hundredth_to_one_to_within_a_fiftieth_of_one():
    x = torch.logspace(-2, 0, 10_001, dtype=torch.float64)
    for a, b, c in QUINTICS:
        x = a * x + b * x**3 + c * x**5
    assert x.min() > 0.98
    assert x.max() < 1.02


@given(st.sampled_from(SHAPES), st.floats(1, 20), st.integers(0, 999))
@settings(max_examples=40)
def test_the_singular_values_of_the_factor_are_one(shape, condition, seed):
    n, m = shape
    x, exact = with_singular_values(torch.logspace(0, -math.log10(condition), n), m, seed)
    found = polar_factor(x[None])[0]
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.97
    assert values.max() < 1.03
    assert torch.linalg.matrix_norm(found - exact, ord=2) < 0.03  # and the directions are kept


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_any_rank_gives_no_value_above_one(shape):
    n, m = shape
    zeros = torch.zeros(1, n, m)
    assert same_bits(polar_factor(zeros), zeros)
    one = torch.linalg.svdvals(polar_factor(torch.ones(1, n, m))[0])
    assert one[0].item() == pytest.approx(1, abs=0.03)
    assert (one[1:] < 1e-3).all()
    spread, _ = with_singular_values(torch.logspace(0, -6, n), m)
    assert torch.linalg.svdvals(polar_factor(spread[None])[0]).max() < 1.03


@given(st.sampled_from(SHAPES), st.sampled_from([-30, -10, -3, 3, 10, 30]), st.integers(0, 99))
@settings(max_examples=40)
def test_the_scale_does_not_matter_and_nothing_over_or_underflows(shape, exponent, seed):
    x, _ = with_singular_values(torch.logspace(0, -1, shape[0]), shape[1], seed)
    found = polar_factor(x[None] * 10.0**exponent)
    torch.testing.assert_close(found, polar_factor(x[None]), rtol=1e-4, atol=1e-5)


def test_what_is_not_a_number_is_not_hidden():
    x = torch.ones(2, 3, 9)
    x[1, 0, 0] = math.nan
    found = polar_factor(x)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


# --- the update ---------------------------------------------------------------------------------


def test_muon_updates_the_matrices_in_the_blocks_and_adamw_the_rest():
    params = random_params(1)
    momentum, exp_avg, exp_avg_sq = MUON.init(params)
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = [f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers]
    assert list(momentum) == expected
    assert list(exp_avg) == list(exp_avg_sq) == [n for n in params if n not in momentum]


@given(st.floats(1e-4, 1), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=15)
def test_each_parameter_is_updated_by_exactly_one_of_the_two(lr, weight_decay, seed):
    params, grads = random_params(seed), random_params(seed + 1)
    numbers = {"count": 1, "lr": lr, "weight_decay": weight_decay}
    new, _ = MUON.update(params, grads, MUON.init(params), **numbers)
    by_adamw, _ = ADAMW.update(params, grads, ADAMW.init(params), **numbers)
    ahead = 1 - MOMENTUM + (1 - MOMENTUM) * MOMENTUM  # of the first gradient, in the momentum
    directions = orthogonal(matrices({n: g * ahead for n, g in grads.items()}))
    for n, p in params.items():
        if n in directions:
            expected = p * (1 - lr * weight_decay) - lr * directions[n]
            torch.testing.assert_close(new[n], expected, rtol=1e-4, atol=1e-5)
            assert not same_bits(new[n], by_adamw[n])
        else:
            assert same_bits(new[n], by_adamw[n])


def test_the_momentum_is_a_moving_average_used_one_gradient_ahead():
    params = {"blocks.0.mlp.fc1.weight": torch.zeros(4, 4)}
    one, two = ({n: torch.diag(torch.tensor(d)) for n in params} for d in ([1.0] * 4, [-0.7] * 4))
    opt_state, numbers = MUON.init(params), {"lr": 1.0, "weight_decay": 0.0}
    for count, grads in enumerate((one, two), start=1):
        params, opt_state = MUON.update(params, grads, opt_state, count=count, **numbers)
    (average,) = opt_state.momentum_buffer.values()
    assert average[0, 0].item() == pytest.approx(0.9 * 0.1 - 0.1 * 0.7)  # above zero
    # 0.9 * average - 0.1 * 0.7 is below zero, so the second update takes the first one back
    assert params["blocks.0.mlp.fc1.weight"].abs().max() < 0.05


@given(st.integers(0, 99))
@settings(max_examples=10)
def test_the_root_mean_square_of_an_update_is_a_fifth_of_the_rate(seed):
    for n, direction in orthogonal(matrices(random_params(seed))).items():
        parts = direction.chunk(3) if "qkv" in n else [direction]
        for part in parts:
            assert part.square().mean().sqrt().item() == pytest.approx(RMS, rel=0.1), n


@pytest.mark.parametrize("changed", range(3), ids="qkv")
def test_q_k_and_v_are_each_for_itself(changed):
    params, grads = random_params(1), random_params(2)
    name, rows = "blocks.1.attn.qkv.weight", slice(changed * CFG.C, (changed + 1) * CFG.C)
    others = {**grads, name: grads[name].clone()}
    others[name][rows] = 1e6 * random_params(3)[name][rows]
    numbers = {"count": 1, "lr": 0.1, "weight_decay": 0.1}
    one, other = (MUON.update(params, g, MUON.init(params), **numbers)[0] for g in (grads, others))
    for n in params:
        if n != name:
            assert same_bits(one[n], other[n]), n
    for i, (a, b) in enumerate(zip(one[name].chunk(3), other[name].chunk(3), strict=True)):
        assert same_bits(a, b) == (i != changed)


def test_a_matrix_does_not_depend_on_those_iterated_beside_it():
    tree = matrices(random_params(1))
    together = orthogonal(tree)
    for n, x in tree.items():
        torch.testing.assert_close(orthogonal({n: x})[n], together[n], rtol=1e-5, atol=1e-6)


def test_the_same_bits_every_time():
    params, grads = random_params(1), random_params(2)
    numbers = {"count": 1, "lr": 0.1, "weight_decay": 0.1}
    one, again = (MUON.update(params, grads, MUON.init(params), **numbers) for _ in range(2))
    for a, b in zip((one[0], *one[1]), (again[0], *again[1]), strict=True):
        assert all(same_bits(a[n], b[n]) for n in a)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e12, 1e30])
def test_gradients_of_any_scale_give_finite_updates(scale):
    params, grads = random_params(1), random_params(2, scale)
    new, opt_state = MUON.update(
        params, grads, MUON.init(params), count=1, lr=0.1, weight_decay=0.0
    )
    for n, average in opt_state.momentum_buffer.items():
        assert average.isfinite().all()
        moved = (new[n] - params[n]).square().mean().sqrt().item()
        assert moved == pytest.approx(0.1 * RMS if scale else 0.0, rel=0.1), n
    assert all(p.isfinite().all() for p in new.values())


# --- in torch.optim's form ----------------------------------------------------------------------


def test_the_modules_form_takes_a_closure_and_gradients_that_are_not_there():
    params = {n: torch.nn.Parameter(p) for n, p in random_params(1).items()}
    before = {n: p.detach().clone() for n, p in params.items()}
    optimizer = MUON.torch_optim(params, lr=0.1, weight_decay=0.0)
    name = "blocks.0.mlp.fc1.weight"

    def closure():
        optimizer.zero_grad()
        loss = params[name].square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(before[name].square().sum().item())
    assert {n for n in params if not torch.equal(params[n], before[n])} == {name}
    assert {int(optimizer.state[p]["step"]) for p in params.values()} == {1}
