"""Keys: the same everywhere, different for different purposes, and apart from the global state."""

import itertools
import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.rng import derive_seed, keyed_generator, make_generator, set_seed
from tests import ROOT

keys = st.tuples(st.integers(0, 2**63 - 1), st.text(max_size=20), st.integers(0, 10**9))


def draw(generator):
    return torch.randint(2**62, (4,), generator=generator).tolist()


def test_keys_never_change():
    assert derive_seed(42, "batch", 0) == 2_884_544_519_713_147_031
    assert derive_seed(0, "", 0) == 4_157_747_470_296_919_386


def test_keys_are_the_same_in_another_process():
    code = "from niels_gpt.rng import derive_seed; print(derive_seed(7, 'dropout', 12))"
    root = str(ROOT)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout) == derive_seed(7, "dropout", 12)


@given(keys, keys)
def test_different_keys_give_different_seeds(one, other):
    assert (derive_seed(*one) == derive_seed(*other)) == (one == other)


def test_no_part_of_a_key_runs_into_the_next():
    numbers, purposes = (1, 11, 111), ("", "1", "11", "/1", "1/", "/", "1/1")
    alike = set(itertools.product(numbers, purposes, numbers))
    assert len({derive_seed(*key) for key in alike}) == len(alike)


def test_steps_seeds_and_purposes_do_not_collide():
    seeds = {
        derive_seed(seed, purpose, step)
        for seed in range(10)
        for purpose in ("batch", "dropout", "init")
        for step in range(1000)
    }
    assert len(seeds) == 30_000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_derived_bits_are_balanced():
    seeds = [derive_seed(3, "batch", step) for step in range(4000)]
    for bit in range(63):
        ones = sum(seed >> bit & 1 for seed in seeds)
        assert abs(ones - 2000) < 5 * 4000**0.5 / 2, f"bit {bit} is set in {ones} of 4000"


@given(keys)
def test_a_keyed_generator_belongs_to_its_key(key):
    assert draw(keyed_generator(*key)) == draw(keyed_generator(*key))
    seed, purpose, step = key
    assert draw(keyed_generator(*key)) != draw(keyed_generator(seed, purpose, step + 1))
    assert keyed_generator(*key).device.type == "cpu"


def test_a_key_needs_whole_numbers():
    with pytest.raises(ValueError, match="format code"):
        derive_seed(1.5, "batch", 0)


def test_keyed_draws_leave_the_global_generators_alone():
    torch_before, python_before = torch.get_rng_state(), random.getstate()
    draw(keyed_generator(1, "batch", 2))
    draw(make_generator(5))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert random.getstate() == python_before


def test_make_generator_takes_seed_and_device():
    assert draw(make_generator(5)) == draw(make_generator(5, "cpu"))
    assert draw(make_generator(5, torch.device("cpu"))) != draw(make_generator(6))


def test_set_seed_fixes_both_global_generators():
    torch_before, python_before = torch.get_rng_state(), random.getstate()
    try:
        set_seed(11)
        first = (torch.rand(3).tolist(), random.random())
        set_seed(11)
        assert (torch.rand(3).tolist(), random.random()) == first
        set_seed(12)
        assert (torch.rand(3).tolist(), random.random()) != first
    finally:
        torch.set_rng_state(torch_before)
        random.setstate(python_before)
