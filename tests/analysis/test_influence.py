"""Influence, against the gradient of each document on a tiny model."""

import math
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt import evaluate
from niels_gpt.analysis import influence
from niels_gpt.config import TrainConfig
from niels_gpt.data.roam import list_roam_paths
from niels_gpt.eval import eval_batches
from niels_gpt.loss import gradients, loss
from niels_gpt.optim.trees import to_vector
from niels_gpt.state import to_modules
from niels_gpt.streams import StreamBuildConfig
from tests.analysis.plain import STREAM, TINY, flat_gradient
from tests.training import copy_of, same_state, trained_state

NOTES = [
    ("long", bytes(i % 16 for i in range(100))),
    ("exact", bytes(i * i % 16 for i in range(9))),
    ("short", bytes([3, 1, 4])),
    ("pair", bytes([15, 0])),
]


def test_influences_are_products_with_the_gradient_of_each_document(state):
    v, unit = influence.validation_gradient(state, STREAM, 2)
    found = influence.influences(state.params, v, NOTES, TINY, unit=unit, windows=100)
    model, _ = to_modules(state)
    model.eval()
    flat_v = to_vector(v)
    for worth, (name, text) in zip(found, NOTES, strict=True):
        pieces = influence.cut(text, 8, 100)
        total, count = 0.0, 0
        for piece in pieces:
            ids = torch.tensor([list(piece)])
            g = flat_gradient(model, ids[:, :-1], ids[:, 1:])
            total += (g @ flat_v).item() * (len(piece) - 1)
            count += len(piece) - 1
        wanted = total / count / unit
        assert (worth.name, worth.nbytes) == (name, len(text))
        assert math.isclose(worth.value, wanted, rel_tol=1e-3, abs_tol=1e-5)


def test_an_influence_is_what_a_small_step_does_to_the_validation_loss(state):
    """Central differences: train on a document, a little, forwards and backwards."""
    batch = insight_batch(state)
    v = gradients(state.params, batch, TINY)[0]
    square = to_vector(v).square().sum().item()
    for name, text in NOTES[1:3]:
        (found,) = influence.influences(state.params, v, [(name, text)], TINY, unit=square)
        ids = torch.tensor([list(text)])
        g, _ = gradients(state.params, (ids[:, :-1], ids[:, 1:]), TINY)
        lr = 0.002 / to_vector(g).norm().item()
        ahead, behind = (
            loss({n: p - sign * lr * g[n] for n, p in state.params.items()}, batch, TINY).item()
            for sign in (1, -1)
        )
        assert math.isclose((behind - ahead) / (2 * lr) / square, found.value, rel_tol=0.02)


def insight_batch(state, first=0, last=2):
    """Return the batches of an evaluation from the first to before the last, as one."""
    drawn = eval_batches(STREAM, B=4, T=8, device="cpu", eval_steps=last, seed=42)
    x, y = (torch.cat(parts) for parts in zip(*list(drawn)[first:], strict=True))
    return x, y


def test_the_validation_gradient_is_that_of_the_first_batches_of_an_evaluation(state):
    v, unit = influence.validation_gradient(state, STREAM, 2)
    model, _ = to_modules(state)
    model.eval()
    wanted = flat_gradient(model, *insight_batch(state)).clone()
    torch.testing.assert_close(to_vector(v), wanted, rtol=1e-3, atol=1e-6)
    other = flat_gradient(model, *insight_batch(state, 2, 4))
    assert math.isclose(unit, (wanted @ other).item(), rel_tol=1e-3)
    cfg = replace(state.train_cfg, eval_steps=2)
    mean = loss(state.params, insight_batch(state), TINY).item()
    assert math.isclose(mean, evaluate(state._replace(train_cfg=cfg), STREAM, 42), rel_tol=1e-5)


def test_the_unit_has_no_noise_of_the_sample_in_it():
    """Where the gradient of all text is 0, it is as often below 0 as above; |v|^2 never is."""
    text = STREAM[:400]
    windows = torch.tensor(list(text)).unfold(0, 9, 1)
    start = trained_state(TINY, B=4)
    for _ in range(300):  # down to where the gradient of all windows is nearly 0
        grads, _ = gradients(start.params, (windows[:, :-1], windows[:, 1:]), TINY)
        start = start._replace(params={n: p - 0.5 * grads[n] for n, p in start.params.items()})
    ratios = []
    for seed in range(20):
        state = start._replace(train_cfg=replace(start.train_cfg, seed=seed))
        v, unit = influence.validation_gradient(state, text, 1)
        ratios.append(unit / to_vector(v).square().sum().item())
    assert abs(sum(ratios) / 20) < 0.5


def test_a_validation_gradient_lost_in_noise_is_said(state, monkeypatch):
    v, _ = influence.validation_gradient(state, STREAM, 1)
    monkeypatch.setattr(influence, "validation_gradient", lambda *_: (v, -0.1))
    with pytest.raises(ValueError, match=r"lost in noise: use more \(--batches\)"):
        influence.documents_worth(state, STREAM, NOTES)


@given(st.binary(min_size=2, max_size=200), st.integers(1, 20), st.integers(1, 8))
def test_pieces_lie_in_the_text_and_are_as_many_and_as_long_as_asked(text, T, windows):
    pieces = influence.cut(text, T, windows)
    assert 1 <= len(pieces) <= windows
    assert all(piece in text and 2 <= len(piece) <= T + 1 for piece in pieces)
    if len(text) <= windows * (T + 1) and windows > 1:  # then nothing is left out
        covered = sum(map(len, pieces))
        assert covered >= len(text)
        assert text.startswith(pieces[0])
        assert text.endswith(pieces[-1])


def test_notes_of_the_validation_split_are_not_scored(texts):
    cfg, run = StreamBuildConfig(roam_root=texts / "notes"), TrainConfig(seed=42)
    notes = influence.training_documents(cfg, run)
    names = {os.path.relpath(path, texts / "notes") for path in list_roam_paths(texts / "notes")}
    assert {name for name, _ in notes} < names
    assert len(notes) == len(names) - 1
    for name, text in notes:
        assert (texts / "notes" / name).read_text().encode() == text  # with \n for \r\n
    with pytest.raises(ValueError, match="no note or file has 1000000 bytes"):
        influence.training_documents(cfg, run, min_bytes=10**6)


def test_documents_are_those_of_the_sources_that_the_run_was_on(texts):
    """Of few files, each without its end, which is for validation."""
    novels = [texts / "wiki" / "train.txt", texts / "wiki" / "val.txt"]
    cfg = StreamBuildConfig(roam_root=texts / "notes", places={"text": tuple(novels)})
    alone = influence.training_documents(cfg, TrainConfig(p_train={"text": 1.0}))
    assert [name for name, _ in alone] == ["train.txt", "val.txt"]
    for (_, text), path in zip(alone, novels, strict=True):
        assert path.read_bytes().startswith(text)
        assert 0.85 < len(text) / path.stat().st_size < 0.96
    both = influence.training_documents(cfg, TrainConfig(p_train={"text": 0.5, "roam": 0.5}))
    neither = TrainConfig(p_train={"wiki": 1.0})
    assert influence.training_documents(cfg, neither) == alone  # named is enough
    notes = influence.training_documents(replace(cfg, places={}), neither)
    assert len(notes) == 11
    assert both == alone + notes


def test_a_run_goes_without_notes_that_are_not_there(texts, tmp_path):
    """As of the default mix, where the user gave a text."""
    novels = (texts / "wiki" / "train.txt",)
    cfg = StreamBuildConfig(roam_root=tmp_path / "gone", places={"text": novels})
    found = influence.training_documents(cfg, TrainConfig())
    assert [name for name, _ in found] == ["train.txt"]
    for places in ({}, {**cfg.places, "roam": tmp_path / "gone"}):
        with pytest.raises(RuntimeError, match="no notes"):
            influence.training_documents(replace(cfg, places=places), TrainConfig())


def test_nothing_is_changed(state):
    before = copy_of(state)
    v, _ = influence.validation_gradient(state, STREAM, 1)
    influence.influences(state.params, v, NOTES, TINY, unit=1.0)
    assert same_state(state, before)
