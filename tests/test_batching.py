"""Laws of the random windows: shape, law of the draw, independence of order, errors."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.batching import get_batch, renormalise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, bytes], dict[str, float], int, int]:
    """Draw valid (sources, p, B, T), with streams as short as T+1 bytes."""
    T = draw(st.integers(1, 12))
    names = draw(st.lists(st.text(max_size=5), min_size=1, max_size=4, unique=True))
    streams = {name: draw(st.binary(min_size=T + 1, max_size=40)) for name in names}
    weights = [draw(st.integers(0, 5)) for _ in names]
    weights[0] += 1
    p = {name: w / sum(weights) for name, w in zip(names, weights, strict=True)}
    return streams, p, draw(st.integers(1, 9)), T


@given(problems(), st.integers(0, 2**63 - 1))
def test_rows_are_windows_of_the_sources_shifted_by_one(problem, seed):
    sources, p, B, T = problem
    x, y = get_batch(sources, p=p, B=B, T=T, device="cpu", generator=generator(seed))
    for ids in (x, y):
        assert ids.shape == (B, T)
        assert ids.dtype == torch.int64
        assert ids.is_contiguous()
    assert torch.equal(y[:, :-1], x[:, 1:])
    for row, last in zip(x.tolist(), y[:, -1].tolist(), strict=True):
        window = bytes([*row, last])
        assert any(window in sources[name] for name in sources if p[name] > 0)


@given(problems(), st.integers(0, 2**63 - 1))
def test_the_draw_depends_on_names_and_not_on_the_order_of_the_dicts(problem, seed):
    sources, p, B, T = problem
    batch = get_batch(sources, p=p, B=B, T=T, device="cpu", generator=generator(seed))
    turned = get_batch(
        dict(reversed(sources.items())),
        p=dict(reversed(p.items())),
        B=B,
        T=T,
        device="cpu",
        generator=generator(seed),
    )
    assert all(torch.equal(a, b) for a, b in zip(batch, turned, strict=True))


def test_every_start_is_drawn_equally_often_from_the_first_to_the_last():
    stream, T, B = bytes(range(10)), 4, 6000  # starts 0..5
    x, y = get_batch({"a": stream}, p={"a": 1.0}, B=B, T=T, device="cpu", generator=generator())
    counts = Counter(x[:, 0].tolist())
    assert sorted(counts) == [0, 1, 2, 3, 4, 5]
    assert int(y.max()) == 9
    chi2 = sum((n - B / 6) ** 2 / (B / 6) for n in counts.values())
    assert chi2 < 20.5  # 0.999 quantile for 5 degrees of freedom


def test_starts_reach_beyond_what_a_float32_can_count():
    stream = bytes(2**24) + b"\0\1" * 2048  # ones at odd positions above 2**24, no float32
    x, _ = get_batch({"a": stream}, p={"a": 1.0}, B=60000, T=1, device="cpu", generator=generator())
    assert 2 <= int(x.sum()) <= 20  # expected: 60000 * 2048 / 2**24 = 7.3


def test_sources_are_drawn_by_their_probabilities():
    sources = {"a": b"a" * 50, "b": b"b" * 5, "never": b"z" * 50}
    p = {"a": 0.8, "b": 0.2, "never": 0.0}
    B = 5000
    x, _ = get_batch(sources, p=p, B=B, T=4, device="cpu", generator=generator())
    counts = Counter(x[:, 0].tolist())
    assert counts[ord("z")] == 0
    assert abs(counts[ord("a")] / B - 0.8) < 4 * math.sqrt(0.16 / B)


def test_a_generator_alone_decides_and_the_global_one_is_left_alone():
    arguments = {"p": {"a": 1.0}, "B": 8, "T": 5, "device": "cpu"}
    sources = {"a": bytes(range(256))}
    before = torch.get_rng_state()
    first = get_batch(sources, generator=generator(1), **arguments)
    torch.rand(1)
    torch.set_rng_state(before)
    again = get_batch(sources, generator=generator(1), **arguments)
    other = get_batch(sources, generator=generator(2), **arguments)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


def test_without_a_generator_torchs_global_one_is_used():
    state = torch.get_rng_state()
    try:
        batches = []
        for _ in range(2):
            torch.manual_seed(7)
            batches.append(
                get_batch({"a": bytes(range(256))}, p={"a": 1.0}, B=4, T=5, device="cpu")
            )
        following = get_batch({"a": bytes(range(256))}, p={"a": 1.0}, B=4, T=5, device="cpu")
    finally:
        torch.set_rng_state(state)
    assert torch.equal(batches[0][0], batches[1][0])
    assert not torch.equal(batches[0][0], following[0])


def test_the_batch_goes_to_the_device():
    x, y = get_batch({"a": bytes(9)}, p={"a": 1.0}, B=2, T=3, device="meta")
    assert x.device.type == y.device.type == "meta"


@pytest.mark.parametrize(
    ("sources", "p", "message"),
    [
        ({"a": bytes(9)}, {"b": 1.0}, r"keys .* p has \['b'\], sources has \['a'\]"),
        ({"a": bytes(9), "b": bytes(9)}, {"a": 1.0}, r"keys .* p has \['a'\]"),
        ({}, {}, "sum to 1"),
        ({"a": bytes(9)}, {"a": 0.99}, r"sum to 1\.0, not 0\.99"),
        ({"a": bytes(9)}, {"a": 1 + 2e-6}, "sum to 1"),
        ({"a": bytes(9)}, {"a": math.nan}, r"sum to 1\.0, not nan"),
        ({"a": bytes(9), "b": bytes(9)}, {"a": 1.5, "b": -0.5}, r"'b': -0\.5"),
        ({"a": bytes(3), "b": bytes(2)}, {"a": 0.5, "b": 0.5}, r"T\+1=4 .*'a': 3, 'b': 2"),
        ({"a": bytes(9), "b": b""}, {"a": 1.0, "b": 0.0}, r"\{'b': 0\}"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(sources, p, message):
    with pytest.raises(ValueError, match=message):
        get_batch(sources, p=p, B=2, T=3, device="cpu")


@pytest.mark.parametrize(("B", "T"), [(0, 3), (2, 0), (-1, 3)])
def test_empty_shapes_are_refused(B, T):
    with pytest.raises(ValueError, match="at least 1"):
        get_batch({"a": bytes(9)}, p={"a": 1.0}, B=B, T=T, device="cpu")


def test_a_sum_off_by_rounding_and_a_stream_of_one_window_are_fine():
    x, y = get_batch({"a": b"abcd"}, p={"a": 1 - 5e-7}, B=3, T=3, device="cpu")
    assert x.tolist() == [list(b"abc")] * 3
    assert y.tolist() == [list(b"bcd")] * 3


# --- renormalise -------------------------------------------------------------------------------

P = {"wiki": 0.784, "roam": 0.196, "primer": 0.02}


def test_renormalise_changes_nothing_where_nothing_is_missing():
    assert renormalise(P, P) == P
    assert renormalise({**P, "off": 0.0}, {*P, "off", "more"}) == P
    thirds = dict.fromkeys("abc", 0.3333333)  # within the tolerance, and not rescaled
    assert renormalise(thirds, thirds) == thirds


@given(st.sets(st.sampled_from(sorted(P)), min_size=1))
def test_renormalise_keeps_the_ratios_and_sums_to_one(available):
    q = renormalise(P, available)
    assert q.keys() == available
    assert math.fsum(q.values()) == pytest.approx(1, abs=1e-12)
    for a in q:
        for b in q:
            assert q[a] / q[b] == pytest.approx(P[a] / P[b])


def test_renormalise_needs_a_source_that_is_left():
    with pytest.raises(ValueError, match="available"):
        renormalise({"roam": 1.0, "wiki": 0.0}, ["wiki"])
