"""AdamW and the clip against torch's own, over generated gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from niels_gpt.optim import BETAS, EPS, adamw, clip_by_global_norm, global_norm
from tests.training import assert_close_trees, same_bits

SHAPES = {"w": (3, 4), "b": (4,), "one": (1,)}
rates = st.floats(0, 1)


def tree(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) * scale for n, s in SHAPES.items()}


def zeros():
    return {n: torch.zeros(s) for n, s in SHAPES.items()}


# From gradients far below eps to such whose square overflows only when 1e4 times larger.
scales = st.sampled_from([0.0, 1e-12, 1e-8, 1e-4, 1.0, 1e4, 1e15])
runs = st.lists(st.tuples(rates, scales), min_size=1, max_size=6)


@given(runs, rates, st.integers(0, 99))
def test_adamw_is_torchs(run, weight_decay, seed):
    params, mu, nu = tree(seed), zeros(), zeros()
    theirs = {n: torch.nn.Parameter(p.clone()) for n, p in params.items()}
    optimizer = torch.optim.AdamW(
        theirs.values(), lr=1.0, betas=BETAS, eps=EPS, weight_decay=weight_decay, foreach=False
    )
    for count, (lr, scale) in enumerate(run, start=1):
        grads = tree(seed + count, scale)
        params, mu, nu = adamw(params, grads, mu, nu, count=count, lr=lr, weight_decay=weight_decay)
        optimizer.param_groups[0]["lr"] = lr
        for name, p in theirs.items():
            p.grad = grads[name].clone()
        optimizer.step()
    moments = {n: optimizer.state[p] for n, p in theirs.items()}
    assert_close_trees(params, {n: p.detach() for n, p in theirs.items()}, rtol=1e-5, atol=1e-5)
    assert_close_trees(mu, {n: m["exp_avg"] for n, m in moments.items()}, rtol=1e-5, atol=0)
    assert_close_trees(nu, {n: m["exp_avg_sq"] for n, m in moments.items()}, rtol=1e-5, atol=0)


def test_the_constants_are_the_contracts():
    assert (BETAS, EPS) == ((0.9, 0.95), 1e-8)


@given(rates, rates, st.integers(1, 10**6), st.integers(0, 99))
def test_numbers_and_tensors_do_the_same(lr, weight_decay, count, seed):
    trees = tree(seed), tree(seed + 1), tree(seed + 2), tree(seed + 3)
    nu = {n: v.square() for n, v in trees[3].items()}
    numbers = {"count": count, "lr": lr, "weight_decay": weight_decay}
    from_numbers = adamw(*trees[:3], nu, **numbers)
    from_tensors = adamw(*trees[:3], nu, **{n: torch.tensor(v) for n, v in numbers.items()})
    for a, b in zip(from_numbers, from_tensors, strict=True):
        assert_close_trees(a, b, rtol=1e-4, atol=1e-6)


def test_a_sweep_maps_over_lr_and_weight_decay():
    trees = tree(1), tree(2), tree(3), {n: v.square() for n, v in tree(4).items()}
    lrs, decays = torch.tensor([0.0, 0.1, 0.5]), torch.tensor([0.1, 0.0, 0.3])

    def update(lr, weight_decay):
        return adamw(*trees, count=3, lr=lr, weight_decay=weight_decay)[0]

    mapped = vmap(update)(lrs, decays)
    for i, (lr, weight_decay) in enumerate(zip(lrs.tolist(), decays.tolist(), strict=True)):
        alone = adamw(*trees, count=3, lr=lr, weight_decay=weight_decay)[0]
        assert_close_trees({n: p[i] for n, p in mapped.items()}, alone, rtol=1e-5)


def test_the_first_step_has_the_length_of_the_learning_rate():
    params, grads = zeros(), tree(1)
    new_params, _, _ = adamw(params, grads, zeros(), zeros(), count=1, lr=0.25, weight_decay=0.0)
    for name, p in new_params.items():
        torch.testing.assert_close(p, -0.25 * grads[name].sign())


def test_decay_is_decoupled_and_scaled_by_the_learning_rate():
    params = tree(1)
    decayed, mu, nu = adamw(params, zeros(), zeros(), zeros(), count=1, lr=0.5, weight_decay=0.2)
    assert_close_trees(decayed, {n: p * 0.9 for n, p in params.items()})
    assert not any(m.any() for m in (*mu.values(), *nu.values()))


def test_at_learning_rate_zero_weights_stay_and_moments_move():
    params, grads = tree(1), tree(2)
    new_params, mu, nu = adamw(params, grads, zeros(), zeros(), count=1, lr=0.0, weight_decay=0.3)
    assert all(same_bits(new_params[n], params[n]) for n in params)
    assert all(m.any() for m in (*mu.values(), *nu.values()))


@given(scales, st.floats(1e-3, 1e3), st.integers(0, 99))
def test_the_clip_is_torchs(scale, max_norm, seed):
    grads = tree(seed, scale)
    theirs = [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES.values()]
    for p, g in zip(theirs, grads.values(), strict=True):
        p.grad = g.clone()
    expected_norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    clipped, norm = clip_by_global_norm(grads, max_norm)
    torch.testing.assert_close(norm, expected_norm, rtol=1e-5, atol=1e-20)
    expected = {n: p.grad for n, p in zip(grads, theirs, strict=True)}
    assert_close_trees(clipped, expected, rtol=1e-5, atol=0)
    assert global_norm(clipped) <= max_norm * (1 + 1e-5)
    if norm < max_norm - 1e-3:
        assert all(same_bits(clipped[n], grads[n]) for n in grads)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_are_reported_not_hidden(bad):
    grads = tree(1)
    grads["b"][2] = bad
    clipped, norm = clip_by_global_norm(grads, 1.0)
    assert not norm.isfinite()
    assert clipped["b"][2].isnan()


def test_the_norm_is_over_all_tensors_together():
    grads = {"a": torch.tensor([3.0]), "b": torch.tensor([[0.0, 4.0]])}
    assert global_norm(grads).item() == 5.0
    clipped, norm = clip_by_global_norm(grads, torch.tensor(1.0))
    assert norm.item() == 5.0
    assert clipped["b"].flatten().tolist() == pytest.approx([0, 0.8])


def test_arguments_are_left_alone():
    trees = tree(1), tree(2), tree(3), {n: v.square() for n, v in tree(4).items()}
    before = [t.clone() for one in trees for t in one.values()]
    results = adamw(*trees, count=2, lr=0.1, weight_decay=0.1)
    clipped, _ = clip_by_global_norm(trees[1], 0.1)
    for t in (t for one in (*results, clipped) for t in one.values()):
        t.fill_(9.0)
    after = [t for one in trees for t in one.values()]
    assert all(same_bits(a, b) for a, b in zip(after, before, strict=True))
