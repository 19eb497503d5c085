"""Evaluation: the same for a state and its module, deterministic, and right by hand."""

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from niels_gpt import TrainConfig, evaluate, make_state, to_modules
from niels_gpt.batching import get_batch
from niels_gpt.eval import eval_loss_on_stream
from niels_gpt.model import GPT
from niels_gpt.rng import make_generator
from tests import reference
from tests.strategies import model_configs
from tests.training import PLAIN, SMALL, copy_of, same_state, trained_state

STREAM = bytes(random.Random(1).choices(range(256), k=500))
TRAIN = {"B": 3, "eval_steps": 4}


def of_module(model, *, stream=STREAM, B=3, T=12, eval_steps=4, seed=5):
    return eval_loss_on_stream(
        model, stream=stream, B=B, T=T, device="cpu", eval_steps=eval_steps, seed=seed
    )


@given(model_configs(), st.integers(1, 200), st.integers(1, 3), st.integers(0, 2**63 - 1))
@settings(max_examples=12)
def test_a_state_and_its_module_agree_to_the_bit(cfg, B, eval_steps, seed):
    state = trained_state(cfg, steps=1, B=B, eval_steps=eval_steps)
    model, _ = to_modules(state)
    expected = of_module(model, B=B, T=cfg.T, eval_steps=eval_steps, seed=seed)
    assert evaluate(state, STREAM, seed) == expected
    assert isinstance(expected, float)


@pytest.mark.parametrize("B", [1, 3, 200])
def test_the_mean_over_all_positions_of_all_batches(B):
    """From logits of the plain formulas on the batches of the seed, summed by hand."""
    state = trained_state(B=B, eval_steps=2)
    generator, nats = make_generator(5), []
    for _ in range(2):
        x, y = get_batch({"v": STREAM}, p={"v": 1.0}, B=B, T=12, device="cpu", generator=generator)
        log_p = reference.logits(state.params, x, SMALL).log_softmax(-1)
        nats += log_p.gather(-1, y[..., None]).flatten().neg().tolist()
    assert len(nats) == 2 * B * 12
    assert evaluate(state, STREAM, 5) == pytest.approx(math.fsum(nats) / len(nats), rel=1e-5)


def test_an_untrained_model_pays_for_every_byte_the_same():
    state = make_state(PLAIN, TrainConfig(**TRAIN))
    zeros = state._replace(params={n: torch.zeros_like(p) for n, p in state.params.items()})
    assert evaluate(zeros, STREAM, 5) == pytest.approx(math.log(256))


def test_one_window_by_hand():
    """Without the blocks' effect and with known embeddings, the logits are known too."""
    cfg = dataclasses.replace(PLAIN, T=2, C=2, H=1, L=1, d_ff=1)
    state = make_state(cfg, TrainConfig(B=1, eval_steps=1))
    params = {n: torch.zeros_like(p) for n, p in state.params.items()}
    params["ln_f.weight"] += 1
    params["tok_emb.weight"][0, 0] = 3.0  # normalised to (1, -1)
    logit = params["tok_emb.weight"][0, 0].item()
    other = math.log(math.exp(logit) + 255)
    stream = bytes([0, 0, 7])  # 0 follows 0, then 7 follows 0
    nats = ((other - logit) + other) / 2
    assert evaluate(state._replace(params=params), stream, 0) == pytest.approx(nats, rel=1e-4)


def test_dropout_is_off():
    state = trained_state(**TRAIN)
    without = dataclasses.replace(SMALL, dropout=0.0)
    assert evaluate(state, STREAM, 1) == evaluate(state._replace(model_cfg=without), STREAM, 1)


def test_the_seed_decides_the_batches_and_nothing_else_does():
    state = trained_state(**TRAIN)
    nats = evaluate(state, STREAM, 5)
    assert nats != evaluate(state, STREAM, 6)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        before = torch.get_rng_state(), random.getstate()
        assert evaluate(state, STREAM, 5) == nats
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
    other = state._replace(step=77, train_cfg=dataclasses.replace(state.train_cfg, seed=9))
    assert evaluate(other, STREAM, 5) == nats


def test_nothing_is_changed():
    state = trained_state(**TRAIN)
    before = copy_of(state)
    evaluate(state, STREAM, 5)
    assert same_state(state, before)
    model, _ = to_modules(state)
    of_module(model)
    assert all(torch.equal(p, before.params[n]) for n, p in model.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_part_that_was_frozen_in_another_mode_stays_so():
    model = GPT(SMALL).train()
    model.blocks[0].eval()
    before = [m.training for m in model.modules()]
    of_module(model)
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_module_is_restored(training):
    model = GPT(SMALL).train(training)
    in_eval, in_train = of_module(model.eval()), of_module(model.train())
    assert in_eval == in_train
    of_module(model.train(training))
    assert {m.training for m in model.modules()} == {training}
    with pytest.raises(ValueError, match="too short"):
        of_module(model, stream=b"short")
    assert {m.training for m in model.modules()} == {training}


def test_an_evaluation_of_no_batches_is_refused():
    with pytest.raises(ValueError, match="eval_steps=0 must be at least 1"):
        of_module(GPT(SMALL), eval_steps=0)


def test_a_stream_needs_one_byte_more_than_the_context():
    state = trained_state(**TRAIN)
    assert math.isfinite(evaluate(state, STREAM[:13], 0))
    with pytest.raises(ValueError, match=r"13.*12"):
        evaluate(state, STREAM[:12], 0)
    with pytest.raises(ValueError, match="too short"):
        evaluate(state, b"", 0)
