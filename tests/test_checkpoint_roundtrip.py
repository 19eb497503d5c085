"""Saving and loading is the identity, bit for bit, and equal content is equal bytes."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt import config
from niels_gpt.checkpoint import (
    checkpoint_of,
    load_checkpoint,
    open_checkpoint,
    save_checkpoint,
    write_checkpoint,
)
from niels_gpt.config import ModelConfig, TrainConfig, to_dict
from niels_gpt.eval import Scores
from niels_gpt.model.gpt import GPT
from niels_gpt.schema import KEYS, content_digest, parameter_shapes, write_payload
from niels_gpt.state import to_modules
from tests import ROOT
from tests.checkpoints import TINY, json_objects, random_payload, random_state, states
from tests.strategies import model_configs
from tests.training import same_state


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def trained(cfg: ModelConfig, make=torch.optim.AdamW, steps: int = 1, **options):
    """Return a model and an optimizer trained on `steps` random batches."""
    torch.manual_seed(7)
    model = GPT(cfg)
    optimizer = make(model.parameters(), **options)
    for _ in range(steps):
        one_step(model, optimizer)
    return model, optimizer


def one_step(model: GPT, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(11)
    x, y = torch.randint(0, model.cfg.V, (2, 3, model.cfg.T), generator=generator)

    def closure():
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        return loss

    optimizer.step(closure)


def test_model_and_optimizer_survive_save_and_load(tmp_path):
    cfg, train_cfg = ModelConfig(T=16, C=32, L=2, d_ff=64, dropout=0.0), TrainConfig(B=3)
    model, optimizer = trained(cfg, lr=1e-3)
    path = str(tmp_path / "latest.pt")
    save_checkpoint(
        path,
        model_cfg=dataclasses.asdict(cfg),
        train_cfg=to_dict(train_cfg),
        model=model,
        optimizer=optimizer,
        step=1,
        best_val_loss=2.5,
    )

    loaded = load_checkpoint(path, device="cpu")
    new_model = GPT(cfg)
    new_optimizer = torch.optim.AdamW(new_model.parameters(), lr=1e-3)
    new_model.load_state_dict(loaded["model_state"])
    new_optimizer.load_state_dict(loaded["optimizer_state"])

    assert loaded["step"] == 1
    assert loaded["best_val_loss"] == 2.5
    assert loaded["model_cfg"] == to_dict(cfg)
    assert loaded["train_cfg"] == to_dict(train_cfg)
    assert list(loaded["model_state"]) == list(model.state_dict())
    for a, b in zip(model.parameters(), new_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    was, now = optimizer.state_dict(), new_optimizer.state_dict()
    assert was["param_groups"] == now["param_groups"]
    assert was["state"].keys() == now["state"].keys()
    for i, entry in was["state"].items():
        assert entry.keys() == now["state"][i].keys()
        for key, value in entry.items():
            assert_same_bits(value, now["state"][i][key])

    for m, o in ((model, optimizer), (new_model, new_optimizer)):
        one_step(m, o)
    for a, b in zip(model.parameters(), new_model.parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach())


@given(state=states(), best=st.none() | st.floats(0, 10))
def test_any_state_survives_bit_for_bit(tmp_path, state, best):
    path = tmp_path / "latest.pt"
    write_checkpoint([path], checkpoint_of(state, Scores(best)))
    opened = open_checkpoint(path)
    assert opened.scores == Scores(best)
    assert same_state(state, opened.state)
    tied = load_checkpoint(path, device="cpu")["model_state"]
    assert tied["lm_head.weight"].data_ptr() == tied["tok_emb.weight"].data_ptr()


@given(train_cfg=json_objects, extra=json_objects)
def test_any_json_value_survives_with_its_types(tmp_path, train_cfg, extra):
    path = tmp_path / "latest.pt"
    extra = {f"extra {key}": value for key, value in extra.items()}
    payload = {**random_payload(), "train_cfg": train_cfg, **extra}
    digest = write_payload([path], payload)
    loaded = load_checkpoint(path, device="cpu")
    assert loaded["digest"] == digest == content_digest(payload)
    for key in ("train_cfg", *extra):
        assert repr(sort(loaded[key])) == repr(sort(payload[key]))


def sort(value):
    if isinstance(value, dict):
        return {key: sort(value[key]) for key in sorted(value)}
    return [sort(item) for item in value] if isinstance(value, list) else value


@given(train_cfg=json_objects)
def test_a_loaded_checkpoint_saves_to_the_same_bytes(tmp_path, train_cfg):
    first, second = tmp_path / "a.pt", tmp_path / "b.pt"
    write_payload([first], {**random_payload(), "train_cfg": train_cfg, "more": ["cpu"]})
    write_payload([second], load_checkpoint(first, device="cpu"))
    assert first.read_bytes() == second.read_bytes()


def test_bytes_depend_on_content_not_on_the_objects_that_hold_it(tmp_path):
    def fresh(text):  # equal to the literal, another object
        return "".join(list(text))

    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    payload = random_payload()
    write_payload([one], {**payload, "train_cfg": {"a": "name", "b": "name", "c": "cpu"}})
    train_cfg = {"c": fresh("cpu"), "b": fresh("name"), fresh("a"): fresh("name")}
    state = payload["model_state"]
    moved = {name: torch.cat([t, t])[: len(t)] for name, t in state.items()}  # views
    write_payload([two], {**payload, "train_cfg": train_cfg, "model_state": moved})
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("name", config.OPTIMIZERS)
def test_the_module_view_and_the_state_view_write_the_same_bytes(tmp_path, name, step):
    state = random_state(step=step, optimizer=name)
    model, optimizer = to_modules(state)
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    save_checkpoint(
        str(a),
        model_cfg=to_dict(state.model_cfg),
        train_cfg=checkpoint_of(state).train_cfg,
        model=model,
        optimizer=optimizer,
        step=step,
        best_val_loss=None,
    )
    write_checkpoint([b], checkpoint_of(state))
    assert a.read_bytes() == b.read_bytes()


PROGRAM = """
import sys, torch
from tests.checkpoints import random_payload
from niels_gpt.schema import write_payload
torch.randn(3)
write_payload([sys.argv[1]], {**random_payload(), "sources": {"wiki": "a", "notes": "b"}})
"""


def test_another_process_with_another_hash_seed_writes_the_same_bytes(tmp_path):
    here, there = tmp_path / "here.pt", tmp_path / "there.pt"
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(there)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": seed},
        check=True,
    )
    sources = {"notes": "b", "wiki": "a"}
    write_payload([here], {**random_payload(), "sources": sources})
    assert here.read_bytes() == there.read_bytes()


OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "AdamW": {"amsgrad": True},
    "Adam": {},
    "NAdam": {},
    "RMSprop": {},
    "Adagrad": {},
    "Adadelta": {},
    "Rprop": {},
    "ASGD": {},
    "Adafactor": {},
    "LBFGS": {"max_iter": 3},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_loop_with_any_optimizer_loads_and_saves(tmp_path, name):
    model, optimizer = trained(TINY, getattr(torch.optim, name), steps=2, **OPTIMIZERS[name])
    plain = tmp_path / "plain.pt"
    payload = {
        "model_cfg": to_dict(TINY),
        "train_cfg": {"lr": 1e-3, "notes": ["mine"]},
        "model_state": model.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "step": 2,
        "best_val_loss": float("inf"),
    }
    torch.save(payload, plain)
    loaded = load_checkpoint(plain, device="cpu")
    assert set(loaded) == set(KEYS)
    assert content_digest(loaded) == content_digest(payload)
    again = tmp_path / "again.pt"
    assert write_payload([again], loaded) == content_digest(payload)
    new_model, new_optimizer = trained(TINY, type(optimizer), 0, **OPTIMIZERS[name])
    saved = load_checkpoint(again, device="cpu")
    new_model.load_state_dict(saved["model_state"])
    new_optimizer.load_state_dict(saved["optimizer_state"])
    one_step(model, optimizer)
    one_step(new_model, new_optimizer)
    for a, b in zip(model.parameters(), new_model.parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach())


def test_a_file_of_torch_save_to_a_name_loads_without_the_optional_keys(tmp_path):
    model, _ = trained(TINY, steps=0)
    payload = {
        "model_cfg": to_dict(TINY),
        "train_cfg": {},
        "model_state": model.state_dict(),
        "step": 0,
    }
    torch.save(payload, tmp_path / "mine.pt")
    loaded = load_checkpoint(tmp_path / "mine.pt", device="cpu")
    assert loaded["optimizer_state"] is None
    assert loaded["best_val_loss"] is None


def test_saving_and_loading_draw_no_random_numbers(tmp_path):
    before = torch.get_rng_state()
    write_payload([tmp_path / "a.pt"], random_payload())
    load_checkpoint(tmp_path / "a.pt", device="cpu")
    assert torch.equal(before, torch.get_rng_state())


def test_tensors_land_on_the_device_with_the_tie_kept(tmp_path):
    write_payload([tmp_path / "a.pt"], random_payload())
    loaded = load_checkpoint(tmp_path / "a.pt", device="meta")
    assert {t.device.type for t in loaded["model_state"].values()} == {"meta"}
    moments = loaded["optimizer_state"]["state"][0]
    assert {t.device.type for t in moments.values()} == {"meta"}
    assert loaded["model_state"]["lm_head.weight"] is loaded["model_state"]["tok_emb.weight"]


@given(cfg=model_configs())
def test_parameter_shapes_are_those_of_the_model(cfg):
    expected = [(name, tuple(p.shape)) for name, p in GPT(cfg).named_parameters()]
    assert list(parameter_shapes(cfg).items()) == expected


@given(states())
def test_the_optimizer_state_is_that_of_the_torch_optim_object(tmp_path, state):
    """Without making one; here one is made, and the files are compared byte for byte."""
    ours = checkpoint_of(state)
    theirs = to_modules(state)[1].state_dict()
    assert ours.optimizer_state["param_groups"] == theirs["param_groups"]
    for name, optimizer_state in (("ours", ours.optimizer_state), ("theirs", theirs)):
        again = dataclasses.replace(ours, optimizer_state=optimizer_state)
        write_checkpoint([tmp_path / name], again)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


SAVE = """
import sys
from niels_gpt import ModelConfig, TrainConfig, make_state
from niels_gpt.checkpoint import checkpoint_of, write_checkpoint
for optimizer in sys.argv[2:]:
    state = make_state(ModelConfig(T=4, C=8, L=1, H=2, d_ff=8), TrainConfig(optimizer=optimizer))
    write_checkpoint([sys.argv[1]], checkpoint_of(state._replace(step=1)))
assert not {"torch._dynamo", "torch._inductor"} & set(sys.modules)
"""


def test_a_save_imports_no_compiler(tmp_path):
    command = [sys.executable, "-c", SAVE, str(tmp_path / "a.pt"), *config.OPTIMIZERS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
