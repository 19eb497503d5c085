"""The examples do what they say: they learn, and the one that resumes continues exactly."""

import importlib.util

import pytest
import torch

from niels_gpt import (
    ModelConfig,
    TrainConfig,
    batch_of_step,
    load_state,
    make_state,
    train_step,
)
from tests import ROOT

TEXT = ROOT / "README.md"


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize("name", ["own_optimizer", "two_seeds"])
def test_it_learns(name):
    losses = example(name)(TEXT)
    assert torch.tensor(losses).max() < 4.5  # 5.5 before


def test_stacked_seeds_are_what_each_would_be_alone():
    losses = example("two_seeds")(TEXT, steps=3)
    model_cfg = ModelConfig(T=64, C=64, L=2, H=2, d_ff=256, dropout=0.0)
    for seed, loss in enumerate(losses):
        cfg = TrainConfig(seed=seed, weight_decay=0.0)
        state = make_state(model_cfg, cfg)
        for k in range(3):
            batch = batch_of_step(42, k, {"text": TEXT.read_bytes()}, p={"text": 1.0}, B=8, T=64)
            state, metrics = train_step(state, batch, 3e-3)
        assert metrics["loss"].item() == pytest.approx(loss, abs=1e-4)  # rounding


def test_two_halves_of_an_own_loop_are_the_whole(tmp_path):
    loop = example("own_loop")
    loop(TEXT, tmp_path / "halves.pt", steps=3)
    half = loop(TEXT, tmp_path / "halves.pt", steps=3)
    assert half == loop(TEXT, tmp_path / "whole.pt", steps=6) < 5.4
    assert (tmp_path / "halves.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()
    assert load_state(tmp_path / "whole.pt").step == 6
