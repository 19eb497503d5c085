"""The compiled step: used only if it agrees with the eager one."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from niels_gpt import ModelConfig, TrainConfig, make_state, train_step
from niels_gpt.checkpoint import load_checkpoint
from niels_gpt.config import OPTIMIZERS
from niels_gpt.model.blocks import Block
from niels_gpt.optim.trees import tree_difference
from niels_gpt.run import compile as compiled
from niels_gpt.run.compile import choose_step, compile_step
from niels_gpt.run.plan import choose_compile, inherited_compile
from niels_gpt.step import loop_step
from tests.training import same_state

MODEL = ModelConfig(T=8, C=8, L=1, H=2, d_ff=8, dropout=0.2)
TRAIN = TrainConfig(B=4, base_lr=0.1)

NEEDS_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)


@pytest.fixture
def state():
    return make_state(MODEL, TRAIN)


@pytest.fixture(params=OPTIMIZERS)
def any_state(request):
    """A state of each optimizer."""
    return make_state(MODEL, replace(TRAIN, optimizer=request.param))


@pytest.fixture
def batch():
    ids = torch.arange(36).view(4, 9)
    return ids[:, :-1], ids[:, 1:]


def wrong(block, x, **more):
    """Compute what a block does, off by a hundredth."""
    return 1.01 * Block.forward(block, x, **more)


def not_a_number(block, x, **more):
    return float("nan") * Block.forward(block, x, **more)


def broken(block, x, **more):
    raise TypeError("no compiler here\nand a long story")


@pytest.mark.parametrize(
    ("compiled_form", "word"),
    [
        (wrong, "differs by"),
        (not_a_number, "nan"),
        (broken, "TypeError: no compiler here"),
    ],
)
def test_what_differs_or_fails_is_not_used_and_that_is_said(
    state, batch, monkeypatch, compiled_form, word
):
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled_form)
    said = []
    step, is_compiled = choose_step(state, batch, said.append)
    assert step is loop_step
    assert not is_compiled
    assert word in said[0]
    assert "\n" not in said[0]


def test_what_agrees_is_used(any_state, batch, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    said = []
    step, is_compiled = choose_step(any_state, batch, said.append)
    assert is_compiled
    assert "used" in said[0]
    found, expected = (each(any_state, batch, 1e-3)[0] for each in (step, train_step))
    pairs = zip(found.opt_state, expected.opt_state, strict=True)
    assert all(tree_difference(*pair) == 0 for pair in pairs)


@NEEDS_COMPILER
def test_the_real_compiler_gives_the_same_steps(any_state, batch):
    eager, fast = any_state, any_state
    step = compile_step()
    for _ in range(3):
        eager, expected = train_step(eager, batch, 1e-2)
        fast, metrics = step(fast, batch, 1e-2)
        torch.testing.assert_close(metrics, expected, rtol=1e-4, atol=1e-5)
    for name, ours in fast.trees().items():
        assert tree_difference(ours, eager.trees()[name]) < 1e-4


@NEEDS_COMPILER
def test_threads_of_a_compiled_step_add_up_in_the_same_order_each_time():
    """With few distinct ids, so that many positions share a row of the embedding."""
    cfg = ModelConfig(T=64, C=64, L=1, H=2, d_ff=64, dropout=0.2)
    state, step = make_state(cfg, TRAIN), compile_step()
    ids = torch.arange(64 * 65).view(64, 65) % 5
    torch.set_num_threads(4)
    first = step(state, (ids[:, :-1], ids[:, 1:]), 1e-2)[0]
    for _ in range(20):
        again = step(state, (ids[:, :-1], ids[:, 1:]), 1e-2)[0]
        assert same_state(again, first)


def test_the_choice_is_recorded_and_a_resume_inherits_it(niels, texts, tmp_path, monkeypatch):
    chosen = []

    def note_and_choose(state, batch, say):
        chosen.append(state.step)
        return train_step, state.step == 0

    monkeypatch.setattr("niels_gpt.run.session.choose_step", note_and_choose)
    config = {"model": vars(MODEL), "train": {"B": 2, "total_steps": 2, "warmup_steps": 0}}
    (tmp_path / "c.json").write_text(json.dumps(config))
    where = ["--wiki", texts / "wiki", "--roam", texts / "notes", "--out", "out"]
    args = ["train", "--config", "c.json", "--device", "cpu", *where]

    def recorded():
        payload = load_checkpoint(tmp_path / "out" / "latest.pt", device="cpu")
        return payload["environment"]["compile"]

    assert niels(*args, "--compile").exit_code == 0
    assert (chosen, recorded()) == ([0], True)
    assert niels(*args, "--resume", "latest", "--set", "train.total_steps=3").exit_code == 0
    assert (chosen, recorded()) == ([0, 2], False)  # the second choice was against it
    assert niels(*args, "--resume", "latest", "--set", "train.total_steps=4").exit_code == 0
    assert chosen == [0, 2]
    assert compiled.TOLERANCE < 0.01


LONG = TrainConfig(total_steps=1000)  # of the default model: 1.7e14 operations


@pytest.mark.parametrize(
    ("asked", "inherited", "device", "cfg", "compiler", "expected"),
    [
        (None, None, "cpu", LONG, "c++", True),
        (None, None, "cpu", LONG, None, False),
        (None, None, "mps", LONG, "c++", False),
        (None, None, "cpu", TrainConfig(total_steps=100, warmup_steps=10), "c++", False),
        (None, False, "cpu", LONG, "c++", False),
        (None, True, "mps", TrainConfig(total_steps=100, warmup_steps=10), "c++", True),
        (False, True, "cpu", LONG, "c++", False),
        (True, None, "mps", LONG, None, True),
    ],
)
def test_what_decides_whether_to_compile(
    asked, inherited, device, cfg, compiler, expected, monkeypatch
):
    monkeypatch.setattr("shutil.which", lambda name: compiler)
    chosen, why = choose_compile(asked, inherited, device, ModelConfig(), cfg)
    assert chosen == expected
    assert why


@pytest.mark.parametrize(
    ("before", "device", "expected"),
    [
        ({"device": "cpu", "compile": True}, "cpu", True),
        ({"device": "cpu", "compile": False}, "cpu", False),
        ({"device": "mps:0", "compile": True}, "mps", True),
        ({"device": "cpu", "compile": True}, "mps", None),
        ({"device": "mps", "compile": False}, "cpu", None),
        ({}, "cpu", False),  # a plain loop's
    ],
)
def test_only_a_run_on_the_same_device_is_compiled_because_it_was(before, device, expected):
    assert inherited_compile(before, device) is expected


def test_all_blocks_are_one_graph_for_all_steps(batch, monkeypatch):
    """A break would leave parts to eager execution; only the time would tell."""
    graphs = []

    def backend(graph, inputs, options):
        graphs.append(graph)
        return graph.forward

    compile_with = partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", compile_with)
    step = compile_step()
    state = expected = make_state(replace(MODEL, L=3), TRAIN)
    for lr in (0.1, 0.2, 0.3):
        state, metrics = step(state, batch, lr)
        expected, expected_metrics = train_step(expected, batch, lr)
        torch.testing.assert_close(metrics, expected_metrics, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
