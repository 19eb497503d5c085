"""The laws of an optimizer as a value, for each in the table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from niels_gpt import ModelConfig, TrainConfig, config, optim
from niels_gpt.optim import (
    OPTIMIZERS,
    from_entries,
    optimizer_of,
    state_fields,
    to_entries,
)
from niels_gpt.optim.clip import clip_by_global_norm
from niels_gpt.optim.trees import map_tensors
from niels_gpt.state import make_state
from tests.training import assert_close_trees, same_bits

CFG = ModelConfig(V=16, T=8, C=8, L=1, H=2, d_ff=12)  # the names and shapes of a model's parameters

pytestmark = pytest.mark.parametrize("name", OPTIMIZERS)
rates = st.floats(0, 1)


def random_params(seed):
    params = make_state(CFG, TrainConfig()).params
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator) for n, p in params.items()}


def trained(optimizer, updates=2, seed=0):
    """Return parameters and a state that have seen gradients."""
    params = random_params(seed)
    opt_state = optimizer.init(params)
    for count in range(1, updates + 1):
        grads = random_params(seed + count)
        params, opt_state = optimizer.update(
            params, grads, opt_state, count=count, lr=0.01, weight_decay=0.1
        )
    return params, opt_state


def leaves(*trees):
    """Return all tensors of trees and tuples of trees, in order."""
    found = []
    map_tensors(lambda t: found.append(t) or t, trees)
    return found


def same(a, b):
    return all(same_bits(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def close(a, b, **tolerance):
    torch.testing.assert_close(leaves(a), leaves(b), **tolerance)


def test_a_state_is_a_namedtuple_of_trees_of_zeros(name):
    params = random_params(1)
    opt_state = OPTIMIZERS[name].init(params)
    assert set(opt_state._fields) <= state_fields()
    for tree in opt_state:
        assert tree.keys() <= params.keys()
        for n, t in tree.items():
            assert (t.shape, t.dtype) == (params[n].shape, torch.float32)
            assert not t.any()
    assert set().union(*opt_state) == params.keys()  # each has an entry in a file


def test_an_update_keeps_the_structure_and_moves_everything(name):
    optimizer = OPTIMIZERS[name]
    params, opt_state = trained(optimizer, 1)
    first = random_params(0)
    assert list(params) == list(first)
    assert all(t.any() for t in leaves(opt_state))
    assert not any(torch.equal(params[n], first[n]) for n in params)
    assert type(opt_state) is type(optimizer.init(first))


def test_arguments_are_left_alone(name):
    optimizer = OPTIMIZERS[name]
    params, opt_state = trained(optimizer)
    given_, grads = (params, opt_state), random_params(9)
    before = map_tensors(torch.clone, (*given_, grads))
    results = optimizer.update(params, grads, opt_state, count=3, lr=0.1, weight_decay=0.1)
    for t in leaves(results):
        t.fill_(9.0)
    assert same((*given_, grads), before)


def test_at_rate_zero_the_parameters_stay_and_the_state_moves(name):
    optimizer = OPTIMIZERS[name]
    params, opt_state = trained(optimizer)
    grads = random_params(9)
    after = optimizer.update(params, grads, opt_state, count=3, lr=0.0, weight_decay=0.3)
    assert same(after[0], params)
    assert not same(after[1], opt_state)


@given(rates, rates, st.integers(1, 10**6), st.integers(0, 99))
@settings(max_examples=20)
def test_numbers_and_tensors_do_the_same(name, lr, weight_decay, count, seed):
    optimizer = OPTIMIZERS[name]
    params, opt_state = trained(optimizer, seed=seed)
    numbers = {"count": count, "lr": lr, "weight_decay": weight_decay}
    as_tensors = {key: torch.tensor(value) for key, value in numbers.items()}
    grads = random_params(seed)
    close(
        optimizer.update(params, grads, opt_state, **numbers),
        optimizer.update(params, grads, opt_state, **as_tensors),
        rtol=1e-4,
        atol=1e-6,
    )


def test_members_are_mapped_over_with_rates_and_decays_of_their_own(name):
    optimizer = OPTIMIZERS[name]
    members = [(*trained(optimizer, seed=seed), random_params(seed + 50)) for seed in (1, 20, 30)]
    lrs, decays = torch.tensor([0.0, 0.1, 0.5]), torch.tensor([0.1, 0.0, 0.3])

    def update(params, opt_state, grads, lr, weight_decay):
        return optimizer.update(params, grads, opt_state, count=3, lr=lr, weight_decay=weight_decay)

    stacked = map_tensors(lambda *each: torch.stack(each), *members)
    mapped = vmap(update)(*stacked, lrs, decays)
    for i, member in enumerate(members):
        alone = update(*member, lrs[i], decays[i])
        close(map_tensors(lambda t, i=i: t[i], mapped), alone, rtol=1e-4, atol=1e-6)


def test_it_is_compiled_as_one_graph(name):
    optimizer, graphs = OPTIMIZERS[name], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(optim.update, backend=backend, dynamic=False, fullgraph=True)
    params, opt_state = trained(optimizer)
    for count in (3, 4):
        rest = {"lr": torch.tensor(0.1 / count), "weight_decay": 0.1, "max_norm": 1.0}
        given_ = (optimizer, params, random_params(count), opt_state)
        result = compiled(*given_, count=torch.tensor(count), **rest)
        close(result, optim.update(*given_, count=torch.tensor(count), **rest))
    assert len(graphs) == 1


def test_an_update_is_the_clip_and_the_update(name):
    optimizer = OPTIMIZERS[name]
    params, opt_state = trained(optimizer)
    grads, rest = random_params(9), {"count": 3, "lr": 0.1, "weight_decay": 0.1}
    clipped, norm = clip_by_global_norm(grads, 0.5)
    expected = *optimizer.update(params, clipped, opt_state, **rest), norm
    assert same(optim.update(optimizer, params, grads, opt_state, max_norm=0.5, **rest), expected)


def test_its_torch_optim_does_the_same_in_place(name):
    optimizer = OPTIMIZERS[name]
    params = random_params(0)
    opt_state = optimizer.init(params)
    modules = {n: torch.nn.Parameter(p.clone()) for n, p in params.items()}
    theirs = optimizer.torch_optim(modules, lr=0.01, weight_decay=0.1)
    for count in (1, 2, 3):
        grads = random_params(count)
        params, opt_state = optimizer.update(
            params, grads, opt_state, count=count, lr=0.01, weight_decay=0.1
        )
        for n, p in modules.items():
            p.grad = grads[n]
        theirs.step()
    assert_close_trees(params, {n: p.detach() for n, p in modules.items()}, rtol=1e-5, atol=1e-5)
    entries = to_entries(opt_state, params, 3)
    for n, p in modules.items():
        assert theirs.state[p].keys() == entries[n].keys()
        torch.testing.assert_close(dict(theirs.state[p]), entries[n], rtol=1e-5, atol=1e-6)


def test_entries_hold_the_whole_state(name):
    optimizer = OPTIMIZERS[name]
    params, opt_state = trained(optimizer)
    initial = optimizer.init(params)
    entries = to_entries(opt_state, params, 2)
    assert same(from_entries(entries, initial), opt_state)
    assert to_entries(initial, params, 0) == {}
    entries["ln_f.bias"] = {"step": torch.tensor(2.0), "momentum_buffer\x1b": torch.zeros(8)}
    with pytest.raises(ValueError, match=r"has \['momentum_buffer\\x1b', 'step'\] for ln_f.bias"):
        from_entries(entries, initial)


def test_the_state_of_another_is_refused_with_both_names(name):
    params, opt_state = trained(OPTIMIZERS[name])
    entries = to_entries(opt_state, params, 2)
    for other in OPTIMIZERS.keys() - {name}:
        with pytest.raises(
            ValueError, match=rf"is that of {name}, but train\.optimizer is {other}"
        ):
            from_entries(entries, OPTIMIZERS[other].init(params))


def test_a_config_names_one_of_the_table(name):
    assert tuple(OPTIMIZERS) == config.OPTIMIZERS
    assert optimizer_of(TrainConfig(optimizer=name)) is OPTIMIZERS[name]
    assert optimizer_of(TrainConfig()) is OPTIMIZERS["adamw"]
