"""Masks: they belong to (seed, step, row, site), and look like independent coins.

All statistics are on fixed keys, so they pass or fail for good. Five standard deviations are
allowed, among at most some ten thousand figures a test.
"""

import hashlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.model import dropout
from niels_gpt.model.dropout import dropout_keys, keep_mask, keep_rate, sites
from tests.training import ACCELERATORS

seeds = st.integers(0, 2**63 - 1)
steps = st.integers(0, 10**9)
rates = st.floats(0, 1, exclude_max=True)
shapes = st.lists(st.integers(1, 7), max_size=3).map(tuple)


def key(seed=1, step=0, row=0, site=0):
    """Return the key of one mask, (1, 2)."""
    return dropout_keys(seed, step, torch.tensor([row]), site + 1)[:, site]


def bits(keys, n, p=0.5):
    """Return one row of n kept-or-not bits for each key of (..., 2), as float32 (keys, n)."""
    return keep_mask(keys.reshape(-1, 2), (n,), p).float()


# --- keys ---------------------------------------------------------------------------------------


def test_masks_never_change():
    """A resumed run must draw what the interrupted one would have drawn."""
    assert dropout_keys(42, 0, range(2), 2).tolist() == KEYS
    mask = keep_mask(dropout_keys(42, 7, range(3), 4)[:, 3], (5, 333), 0.1)
    assert hashlib.sha256(bytes(mask.flatten().tolist())).hexdigest()[:16] == MASK


KEYS = [
    [[612721865, -772790556], [1939477905, 990304438]],
    [[388768151, -1500878465], [1342586617, -1939647552]],
]
MASK = "dbe0b11cf7d16d20"


@given(seeds, steps, st.integers(0, 20), st.integers(0, 20), st.integers(1, 15))
def test_rows_have_their_keys_whatever_the_rest_of_the_batch(seed, step, a, b, n_sites):
    whole = dropout_keys(seed, step, range(max(a, b)), n_sites)
    rows = range(min(a, b), max(a, b))
    assert whole.shape == (max(a, b), n_sites, 2)
    assert whole.dtype == torch.int32
    assert torch.equal(dropout_keys(seed, step, rows, n_sites), whole[rows.start :])
    shuffled = torch.tensor([*reversed(rows)], dtype=torch.int64)
    assert torch.equal(dropout_keys(seed, step, shuffled, n_sites), whole[shuffled])


@given(seeds, steps, st.integers(1, 15), st.integers(1, 15))
def test_sites_have_their_keys_whatever_the_depth_of_the_model(seed, step, a, b):
    few, many = (dropout_keys(seed, step, range(3), n) for n in sorted((a, b)))
    assert torch.equal(few, many[:, : few.shape[1]])


def test_no_two_masks_share_a_key():
    keys = torch.stack(
        [dropout_keys(seed, step, range(64), 13) for seed in range(5) for step in range(40)]
    )
    assert len(keys.reshape(-1, 2).unique(dim=0)) == 5 * 40 * 64 * 13


def test_bits_of_keys_are_balanced():
    keys = torch.stack([dropout_keys(3, step, range(32), 13) for step in range(40)])
    for bit in range(32):
        ones = (keys >> bit & 1).float().mean((0, 1, 2))
        assert (ones - 0.5).abs().max() < 5 * 0.5 / (40 * 32 * 13) ** 0.5


@given(st.integers(1, 50))
def test_sites_of_a_model(L):
    assert sites(L) == 1 + 3 * L


# --- masks --------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 6), shapes, rates)
def test_a_row_has_its_mask_whatever_the_rest_of_the_batch(seed, B, shape, p):
    keys = dropout_keys(seed, 0, range(B), 1)[:, 0]
    whole = keep_mask(keys, shape, p)
    assert whole.shape == (B, *shape)
    assert whole.dtype == torch.bool
    rows = [keep_mask(keys[r : r + 1], shape, p) for r in range(B)]
    assert torch.equal(torch.cat(rows), whole)
    assert torch.equal(torch.func.vmap(lambda k: keep_mask(k[None], shape, p)[0])(keys), whole)


@given(seeds, st.integers(0, 40), st.integers(1, 40), rates)
def test_a_piece_draws_what_the_whole_has_there(seed, start, n, p):
    whole = keep_mask(key(seed), (start + n,), p)
    assert torch.equal(keep_mask(key(seed), (n,), p, start=start), whole[:, start:])


@given(seeds, rates, rates)
def test_a_higher_rate_drops_more(seed, p, q):
    low, high = (keep_mask(key(seed), (100,), rate) for rate in sorted((p, q)))
    assert (low | ~high).all()


@given(rates)
def test_the_rate_is_the_nearest_of_its_steps(p):
    assert 0 < keep_rate(p) <= 1
    assert abs(keep_rate(p) - (1 - p)) <= 2.0**-32 + (p > 1 - 2**-32) * 2.0**-31
    assert keep_rate(p) * 2**31 == round(keep_rate(p) * 2**31)


@pytest.mark.parametrize("p", [0, 1e-9, 0.1, 0.25, 0.5, 0.9, 1 - 2**-31, 1 - 1e-9])
def test_the_rate_is_exact_over_all_draws(p, monkeypatch):
    """In order of size, the draws that keep are the lowest `keep_rate` of all 2**31."""
    kept = round(keep_rate(p) * 2**31)
    draws = [-(2**30), kept - 2**30 - 1, min(kept - 2**30, 2**30 - 1), 2**30 - 1]
    words = torch.tensor([[2 * d + low for d in draws for low in (0, 1)]], dtype=torch.int32)
    monkeypatch.setattr(dropout, "_hash", lambda key, start, n: words)
    mask = keep_mask(torch.zeros(1, 2, dtype=torch.int32), (8,), p)
    every = kept == 2**31
    assert mask.tolist() == [[True] * 4 + [every] * 4]


@given(seeds, rates, shapes)
def test_what_is_kept_is_scaled_up(seed, p, shape):
    keys = dropout_keys(seed, 0, range(3), 1)[:, 0]
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    expected = torch.where(keep_mask(keys, shape, p), x / keep_rate(p), 0 * x)
    torch.testing.assert_close(dropout.dropout(x, keys, p), expected)


def test_the_gradient_passes_where_the_value_did():
    x = torch.ones(2, 50, requires_grad=True)
    keys = dropout_keys(1, 0, range(2), 1)[:, 0]
    y = dropout.dropout(x, keys, 0.3)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_masks_use_no_generator_and_ignore_the_number_of_threads():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        masks = []
        for n in (1, 2):
            torch.set_num_threads(n)
            masks.append(keep_mask(dropout_keys(1, 2, range(2), 2)[:, 1], (100_001,), 0.1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*masks)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("device", ACCELERATORS)
def test_masks_are_the_same_on_every_device(device):
    keys = dropout_keys(1, 2, range(3), 2)[:, 1]
    there = keep_mask(keys.to(device), (5, 333), 0.1)
    assert torch.equal(there.cpu(), keep_mask(keys, (5, 333), 0.1))


# --- statistics ---------------------------------------------------------------------------------

N = 1 << 14  # bits of each mask
FAMILIES = {
    "sites": dropout_keys(42, 0, range(1), 49)[0],
    "rows": dropout_keys(42, 0, range(64), 2)[:, 1],
    "steps": torch.stack([dropout_keys(42, step, range(1), 3)[0, 2] for step in range(64)]),
    "seeds": torch.stack([dropout_keys(seed, 9, range(1), 3)[0, 2] for seed in range(64)]),
    "far rows": dropout_keys(7, 3, torch.arange(0, 1 << 30, 1 << 24), 1)[:, 0],
}


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rate_of_every_mask(family, p):
    mean, rate = bits(FAMILIES[family], N, p).mean(-1), keep_rate(p)
    sigma = (rate * (1 - rate) / N) ** 0.5
    assert (mean - rate).abs().max() < 5 * sigma
    assert abs(mean.mean() - rate) < 5 * sigma / len(mean) ** 0.5
    assert 0.5 * sigma < mean.std() < 1.5 * sigma


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_different_keys_are_uncorrelated(family, p):
    assert correlations(bits(FAMILIES[family], N, p)).abs().max() < 5 / N**0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_different_keys_are_uncorrelated_when_shifted(family):
    """A key that only permutes the counters would show the same bits in other places."""
    masks = bits(FAMILIES[family], N)[:24]
    for shift in (1, 2, 64, N // 2, N // 2 + 1):
        both = torch.cat((masks, masks.roll(shift, -1)))
        assert correlations(both).abs().max() < 5 / N**0.5


def test_masks_of_like_keys_are_not_permutations_of_each_other():
    """First words that differ by c < n: no mask is another one with its counters XOR c."""
    keys = FAMILIES["rows"][:6].clone()
    keys[:, 0] = keys[0, 0] ^ torch.tensor([0, 1, 37, 1000, 4096, 8191])
    masks = bits(keys, N)[:, : N // 2] - 0.5
    spectra = walsh(masks)
    for a, b in itertools.combinations(range(len(masks)), 2):
        agreement = walsh((spectra[a] * spectra[b])[None])[0] / (N // 2) / (N // 8)
        assert agreement.abs().max() < 5.5 / (N // 2) ** 0.5


def walsh(rows):
    """Return the Walsh-Hadamard transform of each row of (k, 2**m)."""
    k, n = rows.shape
    width = 1
    while width < n:
        pairs = rows.view(k, -1, 2, width)
        rows = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2)
        rows, width = rows.reshape(k, n), 2 * width
    return rows


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_elements_of_one_mask_are_uncorrelated(p):
    """At lags of neighbours, columns, powers of two, and the two halves of a word."""
    n = 1 << 17
    masks = bits(FAMILIES["sites"][:4], n, p)
    masks = masks - masks.mean(-1, keepdim=True)
    variance = masks.square().mean(-1)
    lags = {*range(1, 70), *(1 << i for i in range(17)), 100, 255, 257, 1000, n // 2 - 1}
    for lag in lags:
        covariance = (masks[:, lag:] * masks[:, : n - lag]).mean(-1)
        assert (covariance / variance).abs().max() < 5 / (n - lag) ** 0.5, lag


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize(
    "places",
    [(0, 1, 2, 3, 4, 5), (0, 16, 32, 48), (0, 256, 512, 768), (0, 1, 256, 257), "word", "sites"],
    ids=str,
)
def test_patterns_of_bits_are_as_frequent_as_their_probability(places, p):
    """Chi-square over all patterns of several bits at once, which correlations cannot see."""
    n, keys = 1 << 16, FAMILIES["sites"]
    if places == "sites":
        columns = [*bits(keys[:5], n, p)]
    else:
        mask, half = bits(keys[:1], n, p)[0], n // 2
        offsets = (0, half, 1, half + 1) if places == "word" else places
        starts = disjoint(offsets, half)
        columns = [mask[starts + o] for o in offsets]
    k = len(columns)
    pattern = sum(column.long() << i for i, column in enumerate(columns))
    count = pattern.bincount(minlength=1 << k).float()
    kept = torch.tensor([bin(i).count("1") for i in range(1 << k)])
    expected = len(pattern) * keep_rate(p) ** kept * (1 - keep_rate(p)) ** (k - kept)
    chi_square = ((count - expected) ** 2 / expected).sum().item()
    freedom = (1 << k) - 1
    assert abs(chi_square - freedom) < 6 * (2 * freedom) ** 0.5 + 6


def disjoint(offsets, n):
    """Return starts up to n whose windows of these offsets do not overlap."""
    taken, starts = set(), []
    for start in range(n - max(o for o in offsets if o < n)):
        window = {start + o for o in offsets}
        if not window & taken:
            taken |= window
            starts.append(start)
    return torch.tensor(starts)


def test_dropout_keeps_the_expectation():
    x = torch.ones(len(FAMILIES["rows"]), N)
    y = dropout.dropout(x, FAMILIES["rows"], 0.1)
    assert abs(y.mean() - 1) < 5 * (0.1 / 0.9 / y.numel()) ** 0.5


def correlations(rows):
    """Return the correlation of each pair of rows, 1-D."""
    rows = rows - rows.mean(-1, keepdim=True)
    rows = rows / rows.norm(dim=-1, keepdim=True)
    above = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1)
    return (rows @ rows.T)[above]
