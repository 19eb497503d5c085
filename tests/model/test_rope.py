"""Rotary positions: against complex numbers, and the two laws that define them."""

import cmath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.model.rope import apply_rope, expand, rope_cache, rotate

thetas = st.floats(1.0, 1e6)
widths = st.integers(1, 8).map(lambda half: 2 * half)
seeds = st.integers(0, 2**32)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 300), widths, thetas)
def test_tables_hold_sin_and_cos_of_position_times_frequency(T, D, theta):
    sin, cos = rope_cache(T, D, theta=theta)
    assert sin.shape == cos.shape == (1, 1, T, D // 2)
    assert sin.dtype == cos.dtype == torch.float32
    for pos in {0, T // 2, T - 1}:
        turns = [cmath.exp(1j * pos * theta ** (-2 * i / D)) for i in range(D // 2)]
        rounding = 1e-6 + pos * 2.0**-23  # of the angle
        assert sin[0, 0, pos].tolist() == pytest.approx([z.imag for z in turns], abs=rounding)
        assert cos[0, 0, pos].tolist() == pytest.approx([z.real for z in turns], abs=rounding)


def test_the_default_base_is_ten_thousand():
    assert torch.equal(rope_cache(9, 8)[0], rope_cache(9, 8, theta=1e4)[0])
    assert not torch.equal(rope_cache(9, 8)[0], rope_cache(9, 8, theta=1e3)[0])


def test_tables_take_dtype_and_device():
    single = rope_cache(300, 8)
    half = rope_cache(300, 8, dtype=torch.bfloat16)
    assert all(torch.equal(h, s.bfloat16()) for h, s in zip(half, single, strict=True))
    assert all(t.device.type == "meta" for t in rope_cache(3, 4, device="meta"))


def test_tables_of_float64_are_that_exact():
    sin, cos = rope_cache(256, 64, dtype=torch.float64)
    angle = torch.arange(256, dtype=torch.float64) * 10_000.0 ** (-2 / 64)
    torch.testing.assert_close(sin[0, 0, :, 1], angle.sin(), rtol=0, atol=1e-12)
    torch.testing.assert_close(cos[0, 0, :, 1], angle.cos(), rtol=0, atol=1e-12)


def test_an_odd_head_width_is_refused():
    with pytest.raises(ValueError, match="D=5"):
        rope_cache(4, 5)


@given(st.integers(1, 12), widths, thetas, seeds)
def test_neighbours_turn_like_complex_numbers(T, D, theta, seed):
    q, k = normal(2, 3, T, D, seed=seed), normal(2, 3, T, D, seed=seed + 1)
    turned = apply_rope(q, k, *rope_cache(T, D, theta=theta))
    for before, after in zip((q, k), turned, strict=True):
        assert after.shape == before.shape
        for pos in range(T):
            pairs = before[1, 2, pos].view(-1, 2).tolist()
            expected = [
                complex(a, b) * cmath.exp(1j * pos * theta ** (-2 * i / D))
                for i, (a, b) in enumerate(pairs)
            ]
            got = [complex(a, b) for a, b in after[1, 2, pos].view(-1, 2).tolist()]
            assert got == pytest.approx(expected, abs=2e-5)


@given(st.integers(1, 200), widths, thetas, seeds)
def test_norms_are_kept(T, D, theta, seed):
    q = normal(1, 2, T, D, seed=seed)
    turned, _ = apply_rope(q, q, *rope_cache(T, D, theta=theta))
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))


@given(widths, thetas, seeds)
def test_scores_depend_on_distance_only(D, theta, seed):
    T = 40
    q = normal(1, 1, 1, D, seed=seed).expand(1, 1, T, D)
    k = normal(1, 1, 1, D, seed=seed + 1).expand(1, 1, T, D)
    turned_q, turned_k = apply_rope(q, k, *rope_cache(T, D, theta=theta))
    scores = (turned_q @ turned_k.mT)[0, 0]
    for distance in range(-T + 1, T):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(
            diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=2e-5 * (1 + D)
        )


def test_distance_matters_and_so_does_its_sign():
    q = torch.ones(1, 1, 3, 2)
    k = torch.tensor([1.0, 0.0]).expand(1, 1, 3, 2)
    turned_q, turned_k = apply_rope(q, k, *rope_cache(3, 2))
    scores = (turned_q @ turned_k.mT)[0, 0]
    assert len({round(scores[1, pos].item(), 3) for pos in range(3)}) == 3


@given(st.integers(1, 20), st.integers(0, 20), widths)
def test_the_first_rows_of_a_longer_table_are_used(Tq, extra, D):
    q, k = normal(2, 1, Tq, D), normal(2, 1, Tq, D, seed=1)
    short = apply_rope(q, k, *rope_cache(Tq, D))
    long = apply_rope(q, k, *rope_cache(Tq + extra, D))
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))


@given(st.integers(1, 20), widths, thetas, seeds)
def test_the_rotated_identity_is_the_matrix_of_the_rotation(T, D, theta, seed):
    q, tables = normal(2, 3, T, D, seed=seed), rope_cache(T, D, theta=theta)
    turned, _ = apply_rope(q, q, *tables)
    sin, cos, turn = expand(*(table[0, 0] for table in tables))
    for t in range(T):
        matrix = rotate(torch.eye(D), sin[t], cos[t], turn)
        torch.testing.assert_close(q[..., t, :] @ matrix, turned[..., t, :])


def case(q=(2, 3, 4, 6), k=(2, 3, 4, 6), sin=(1, 1, 4, 3), cos=(1, 1, 4, 3)):
    return [torch.zeros(shape) for shape in (q, k, sin, cos)]


@pytest.mark.parametrize(
    "tensors",
    [
        case(q=(3, 4, 6), k=(3, 4, 6)),
        case(q=(1, 2, 3, 4, 6), k=(1, 2, 3, 4, 6)),
        case(k=(2, 3, 3, 6)),
        case(k=(2, 1, 4, 6)),
        case(k=(2, 3, 4, 8)),
        case(q=(2, 3, 4, 7), k=(2, 3, 4, 7)),
        case(cos=(1, 1, 5, 3)),
        case(sin=(4, 3), cos=(4, 3)),
        case(sin=(2, 1, 4, 3), cos=(2, 1, 4, 3)),
        case(sin=(1, 3, 4, 3), cos=(1, 3, 4, 3)),
        case(sin=(1, 1, 3, 3), cos=(1, 1, 3, 3)),
        case(sin=(1, 1, 4, 6), cos=(1, 1, 4, 6)),
        case(sin=(1, 1, 4, 1), cos=(1, 1, 4, 1)),
    ],
    ids=lambda tensors: " ".join(str(tuple(t.shape)) for t in tensors),
)
def test_shapes_that_do_not_match_are_refused(tensors):
    with pytest.raises(ValueError, match=r"\d"):
        apply_rope(*tensors)


@pytest.mark.parametrize("odd_one_out", range(4))
@pytest.mark.parametrize("change", [{"dtype": torch.bfloat16}, {"device": "meta"}], ids=str)
def test_mixed_dtypes_and_devices_are_refused(odd_one_out, change):
    tensors = case()
    apply_rope(*tensors)
    tensors[odd_one_out] = tensors[odd_one_out].to(**change)
    with pytest.raises(ValueError, match="differ"):
        apply_rope(*tensors)


def test_nothing_is_cast():
    tensors = [t.bfloat16() for t in case()]
    assert all(t.dtype == torch.bfloat16 for t in apply_rope(*tensors))
