"""Scores of streams: the full one counts each byte once, and equals the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from niels_gpt import ModelConfig, TrainConfig, evaluate, make_state
from niels_gpt.analysis.score import (
    Score,
    Window,
    default_stride,
    full_windows,
    sampled_windows,
    score,
    sliding_spans,
)
from niels_gpt.loss import forward
from niels_gpt.rng import make_generator
from tests.strategies import model_configs

SMALL = ModelConfig(T=8, C=8, L=1, H=2, d_ff=8, dropout=0.3)


def spread(state, seed=0):
    """Scale the weights up, so that predictions differ from byte to byte."""
    return state._replace(params={name: 20 * p for name, p in state.params.items()})


def bytes_of(n, seed=0):
    ids = torch.randint(256, (n,), generator=make_generator(seed))
    return bytes(ids.tolist())


def by_definition(state, stream, stride):
    """Each byte after its own context alone: rule 'windows of T, every `stride` bytes'."""
    T, losses = state.model_cfg.T, [math.log(256)]
    for i in range(1, len(stream)):
        if i <= T:
            context = stream[:i]
        else:
            end = min(T + stride * math.ceil((i - T) / stride), len(stream) - 1)
            context = stream[end - T : i]
        x = torch.tensor([list(context)])
        losses.append(-forward(state.params, x, state.model_cfg)[0, -1].log_softmax(0)[stream[i]])
    return [float(loss) for loss in losses]


@given(st.integers(0, 200), st.integers(1, 20), st.data())
def test_spans_cover_each_target_once_with_as_much_context_as_promised(n, T, data):
    stride = data.draw(st.integers(1, T))
    seen = []
    for start, scored in sliding_spans(n, T, stride):
        width = min(T, n - 1)
        assert start >= 0
        assert start + width <= n - 1
        targets = range(start + width - scored + 1, start + width + 1)
        seen += targets
        contexts = [target - start for target in targets]
        if targets[0] > T:
            assert T - stride + 1 <= min(contexts)
            assert max(contexts) == T
        else:
            assert start == 0
    assert seen == list(range(1, n))


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_outside_the_window_is_refused(stride):
    with pytest.raises(ValueError, match=f"stride={stride} must be from 1 to T=8"):
        sliding_spans(100, 8, stride)
    with pytest.raises(ValueError, match=f"stride={stride} "):
        list(full_windows(make_state(SMALL, TrainConfig()), bytes(100), stride=stride))


@settings(max_examples=8)
@given(st.integers(1, 25), st.integers(1, 8))
def test_a_full_score_is_the_definition(n, stride):
    state = spread(make_state(SMALL, TrainConfig()))
    stream = bytes_of(n, seed=n)
    expected = by_definition(state, stream, stride)
    result = score(full_windows(state, stream, stride=stride))
    assert result.scored == n
    assert result.nats == pytest.approx(math.fsum(expected) / n, rel=1e-5)


def test_the_first_byte_is_one_of_256_alike():
    state = make_state(SMALL, TrainConfig())
    assert score(full_windows(state, b"a")) == Score(math.log(256), pytest.approx(8.0), None, 1)


def test_nothing_to_score_is_said():
    state = make_state(SMALL, TrainConfig())
    with pytest.raises(ValueError, match="the text is empty"):
        score(full_windows(state, b""))


@settings(max_examples=6)
@given(st.integers(1, 12), st.integers(1, 50))
def test_a_full_score_does_not_depend_on_the_batch(rows, B):
    """Not by a bit on the batch size of the config, by rounding on the windows at a time."""
    stream = bytes_of(41)
    state = spread(make_state(SMALL, TrainConfig()))
    expected = score(full_windows(state, stream))
    other = state._replace(train_cfg=TrainConfig(B=B, seed=B, eval_steps=B))
    assert score(full_windows(other, stream)) == expected
    assert score(full_windows(state, stream, rows=rows)) == pytest.approx(expected, rel=1e-6)


def test_the_default_stride_is_half_a_window():
    state = make_state(SMALL, TrainConfig())
    stream = bytes_of(50)
    assert [*full_windows(state, stream)] == [*full_windows(state, stream, stride=4)]
    assert default_stride(1) == 1


@settings(max_examples=5)
@given(model_configs(), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_samples_have_the_loss_of_the_training_log(model_cfg, B, eval_steps, seed):
    state = make_state(model_cfg, TrainConfig(B=B, eval_steps=eval_steps))
    stream = bytes_of(64)
    result = score(sampled_windows(state, stream, seed))
    assert result.nats == pytest.approx(evaluate(state, stream, seed), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(result.nats / math.log(2))
    assert result.scored == B * eval_steps * model_cfg.T


def test_scores_are_deterministic_and_leave_the_state_alone():
    state = make_state(SMALL, TrainConfig(B=2, eval_steps=2))
    before = {name: p.clone() for name, p in state.params.items()}
    stream = bytes_of(70)
    torch.manual_seed(1)
    first = [*full_windows(state, stream)], [*sampled_windows(state, stream, 5)]
    torch.manual_seed(2)
    assert ([*full_windows(state, stream)], [*sampled_windows(state, stream, 5)]) == first
    assert all(torch.equal(before[name], p) for name, p in state.params.items())


@given(st.lists(st.floats(0.1, 9), min_size=2, max_size=30), st.integers(1, 64), st.randoms())
def test_the_standard_error_is_the_textbook_one_for_equal_windows(means, T, random):
    windows = [Window(T, mean * T) for mean in means]
    result = score(windows)
    mean = sum(means) / len(means)
    variance = sum((m - mean) ** 2 for m in means) / (len(means) - 1)
    assert result.nats == pytest.approx(mean)
    assert result.standard_error == pytest.approx(math.sqrt(variance / len(means)), abs=1e-9)
    random.shuffle(windows)
    assert score(windows).nats == result.nats


def test_the_standard_error_predicts_how_samples_scatter():
    """Means of 40 windows each scatter by what one of them says of itself, within a third."""
    generator = make_generator(3)
    draws = torch.randn(400, 40, generator=generator)
    scores = [score(Window(1, x) for x in row) for row in draws.tolist()]
    scatter = torch.tensor([s.nats for s in scores]).std().item()
    said = sum(s.standard_error for s in scores) / len(scores)
    assert said == pytest.approx(scatter, rel=0.33)
