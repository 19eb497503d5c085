"""The clip against torch's own, over generated gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.optim.clip import clip_by_global_norm
from niels_gpt.optim.trees import global_norm
from tests.optim.trees import SHAPES, random_tree, scales
from tests.training import assert_close_trees, same_bits


@given(scales, st.floats(1e-3, 1e3), st.integers(0, 99))
def test_the_clip_is_torchs(scale, max_norm, seed):
    grads = random_tree(seed, scale)
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
    grads = random_tree(1)
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


def test_gradients_are_left_alone():
    grads, before = random_tree(1), random_tree(1)
    for t in clip_by_global_norm(grads, 0.1)[0].values():
        t.fill_(9.0)
    assert all(same_bits(grads[n], before[n]) for n in grads)
