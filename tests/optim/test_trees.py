"""Trees as vectors, and functions mapped over them."""

import torch

from niels_gpt import TrainConfig, make_state
from niels_gpt.optim.trees import map_tensors, to_tree, to_vector
from tests.optim.trees import random_tree
from tests.training import SMALL, same_bits, same_state, tensors


def test_a_vector_is_cut_into_the_tree_that_it_was():
    tree = random_tree(1)
    again = to_tree(to_vector(tree), tree)
    assert list(again) == list(tree)
    assert all(same_bits(again[n], tree[n]) for n in tree)


def test_a_state_is_mapped_tensor_by_tensor_and_the_rest_is_kept():
    state = make_state(SMALL, TrainConfig())
    doubled = map_tensors(torch.add, state, state)
    assert type(doubled) is type(state)
    assert type(doubled.opt_state) is type(state.opt_state)
    assert doubled[2:] == state[2:]
    for name, t in tensors(doubled).items():
        assert same_bits(t, 2 * tensors(state)[name])
    assert same_state(map_tensors(torch.clone, state), state)
