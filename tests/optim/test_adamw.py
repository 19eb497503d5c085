"""AdamW against torch's own, over generated gradients."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.optim.adamw import BETAS, EPS, AdamWState, init, preconditioner, update
from tests.optim.trees import random_tree, scales, zeros
from tests.training import assert_close_trees, same_bits

rates = st.floats(0, 1)
runs = st.lists(st.tuples(rates, scales), min_size=1, max_size=6)


@given(runs, rates, st.integers(0, 99))
def test_adamw_is_torchs(run, weight_decay, seed):
    params = random_tree(seed)
    opt_state = init(params)
    theirs = {n: torch.nn.Parameter(p.clone()) for n, p in params.items()}
    optimizer = torch.optim.AdamW(
        theirs.values(), lr=1.0, betas=BETAS, eps=EPS, weight_decay=weight_decay, foreach=False
    )
    for count, (lr, scale) in enumerate(run, start=1):
        grads = random_tree(seed + count, scale)
        params, opt_state = update(
            params, grads, opt_state, count=count, lr=lr, weight_decay=weight_decay
        )
        optimizer.param_groups[0]["lr"] = lr
        for name, p in theirs.items():
            p.grad = grads[name].clone()
        optimizer.step()
    assert_close_trees(params, {n: p.detach() for n, p in theirs.items()}, rtol=1e-5, atol=1e-5)
    for field, tree in opt_state._asdict().items():
        expected = {n: optimizer.state[p][field] for n, p in theirs.items()}
        assert_close_trees(tree, expected, rtol=1e-5, atol=0)


def test_the_constants_are_the_contracts():
    assert (BETAS, EPS) == ((0.9, 0.95), 1e-8)


def test_the_first_step_has_the_length_of_the_learning_rate():
    grads = random_tree(1)
    new_params, _ = update(zeros(), grads, init(grads), count=1, lr=0.25, weight_decay=0.0)
    for name, p in new_params.items():
        torch.testing.assert_close(p, -0.25 * grads[name].sign())


def test_decay_is_decoupled_and_scaled_by_the_learning_rate():
    params = random_tree(1)
    decayed, opt_state = update(params, zeros(), init(params), count=1, lr=0.5, weight_decay=0.2)
    assert_close_trees(decayed, {n: p * 0.9 for n, p in params.items()})
    assert not any(m.any() for tree in opt_state for m in tree.values())


def test_at_learning_rate_zero_weights_stay_and_moments_move():
    params, grads = random_tree(1), random_tree(2)
    new_params, opt_state = update(params, grads, init(params), count=1, lr=0.0, weight_decay=0.3)
    assert all(same_bits(new_params[n], params[n]) for n in params)
    assert all(m.any() for tree in opt_state for m in tree.values())


def test_the_preconditioner_is_what_the_update_divided_by():
    params, grads, before = zeros(), random_tree(1), init(zeros())
    for count in (1, 2, 3):
        after, opt_state = update(params, grads, before, count=count, lr=0.1, weight_decay=0.0)
        P = preconditioner(opt_state, count)
        for name, p in after.items():
            mean = opt_state.exp_avg[name] / (1 - BETAS[0] ** count)
            torch.testing.assert_close(p, params[name] - 0.1 * mean / P[name])
        params, before = after, opt_state


def test_there_is_no_preconditioner_without_gradients_or_under_another_optimizer():
    assert preconditioner(init(zeros()), 0) is None
    assert preconditioner(AdamWState(random_tree(1), zeros()), 3) is None
    assert preconditioner((zeros(),), 3) is None
