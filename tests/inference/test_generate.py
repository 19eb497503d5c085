"""Generation: the cache is the recomputed window, draws are keyed, samplers keep their word."""

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from niels_gpt.config import ModelConfig
from niels_gpt.inference.cached import bind
from niels_gpt.inference.generate import (
    START,
    Sampling,
    begin,
    decode_stream,
    distribution,
    extend,
    generate,
    invert_cdf,
    stream,
    window_start,
)
from niels_gpt.loss import forward
from niels_gpt.rng import keyed_generator
from tests.strategies import model_configs
from tests.trained import lively_state

TINY = ModelConfig(T=8, C=12, L=2, H=2, d_ff=16, dropout=0.1)
LENGTHS = st.integers(1, 20)


def lively(cfg=TINY):
    return lively_state(cfg).params


def some_bytes(n, seed=0, B=None):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n,) if B is None else (B, n), generator=generator)


def recomputed(params, cfg, ids):
    """Return the next logits of texts (B, n) from one pass over their windows."""
    window = ids[:, window_start(ids.shape[1], cfg.T) :]
    with torch.no_grad():
        return forward(params, window, cfg)[:, -1]


def recomputed_bytes(params, cfg, prompt, n, seed, i, sampling):
    """Generate by recomputing the window for every byte."""
    text, generator = list(prompt or START), keyed_generator(seed, "sample", i)
    for _ in range(n):
        logits = recomputed(params, cfg, torch.tensor([text]))
        uniform = torch.rand(1, generator=generator)
        text.append(int(invert_cdf(distribution(logits, sampling), uniform)))
    return bytes(text[len(prompt or START) :])


# --- the window --------------------------------------------------------------------------------


@given(n=st.integers(1, 500), T=st.integers(1, 64))
def test_the_window_is_the_whole_text_up_to_T_and_then_more_than_half_of_T(n, T):
    length = n - window_start(n, T)
    if n <= T:
        assert length == n
    else:
        assert T // 2 < length <= T


@given(T=st.integers(1, 64))
def test_the_window_only_moves_forward_and_only_once_it_is_full(T):
    starts = [window_start(n, T) for n in range(1, 6 * T)]
    for n, (a, b) in enumerate(pairwise(starts), start=1):
        assert b == a or (n - a == T and b - a == T - T // 2)


@pytest.mark.parametrize("T", [1, 2, 3, 8])
def test_the_cache_is_the_recomputed_window_at_every_length(T):
    cfg = ModelConfig(T=T, C=12, L=2, H=2, d_ff=16, dropout=0.1)
    params, text = lively(cfg), some_bytes(5 * T + 2, B=3)
    weights = bind(params, cfg)
    context = begin(weights, text[:, :1])
    for n in range(2, text.shape[1]):
        context = extend(weights, context, text[:, n - 1])
        assert torch.equal(context.window, text[:, window_start(n, T) : n])
        torch.testing.assert_close(
            context.logits, recomputed(params, cfg, text[:, :n]), rtol=1e-5, atol=1e-5
        )


@given(cfg=model_configs(), n=LENGTHS, more=LENGTHS, seed=st.integers(0, 9))
def test_to_extend_what_was_begun_is_to_begin_with_more(cfg, n, more, seed):
    weights, text = bind(lively(cfg), cfg), some_bytes(n + more, seed, B=2)
    context = begin(weights, text[:, :n])
    for i in range(n, n + more):
        context = extend(weights, context, text[:, i])
    whole = begin(weights, text)
    assert torch.equal(context.window, whole.window)
    torch.testing.assert_close(context.logits, whole.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(context.past, whole.past, rtol=1e-4, atol=1e-4)


def test_many_texts_are_begun_in_blocks_and_each_is_as_if_alone():
    cfg = ModelConfig(T=600, C=12, L=1, H=2, d_ff=16)
    weights, text = bind(lively(cfg), cfg), some_bytes(600, B=3)
    alone = torch.cat([begin(weights, text[i : i + 1]).logits for i in range(3)])
    torch.testing.assert_close(begin(weights, text).logits, alone, rtol=1e-5, atol=1e-5)


def parts(context):
    return [context.window.clone(), context.past.clone(), context.logits.clone()]


def test_extend_changes_neither_the_model_nor_the_context():
    params = lively()
    before = {name: p.clone() for name, p in params.items()}
    weights = bind(params, TINY)
    context = begin(weights, some_bytes(TINY.T - 2, B=2))
    kept, futures = parts(context), []
    for byte in (1, 2, 3):  # three futures of one past
        longer = extend(weights, context, torch.tensor([byte, byte]))
        futures += [(future, parts(future)) for future in (longer, twice(weights, longer))]
    torch.testing.assert_close(parts(context), kept, rtol=0, atol=0)
    for future, then in futures:
        torch.testing.assert_close(parts(future), then, rtol=0, atol=0)
    torch.testing.assert_close(params, before, rtol=0, atol=0)


def twice(weights, context):
    """Extend a context in two ways; return the second."""
    return [extend(weights, context, torch.tensor([byte, 0])) for byte in (7, 8)][1]


def test_the_cache_of_one_future_is_not_copied():
    weights = bind(lively(), TINY)
    context = begin(weights, some_bytes(1, B=1))
    caches = set()
    for byte in range(1, TINY.T):
        context = extend(weights, context, torch.tensor([byte]))
        caches.add(context.cache.kv.data_ptr())
    assert len(caches) == 1


# --- generated texts ---------------------------------------------------------------------------


@given(
    prompt=st.binary(max_size=20),
    n=st.integers(0, 12),
    seed=st.integers(0, 2**40),
    sampling=st.sampled_from(
        [Sampling(), Sampling(0.0), Sampling(0.7, top_k=9), Sampling(1.5, top_p=0.9)]
    ),
)
def test_the_bytes_are_those_of_full_recomputation(prompt, n, seed, sampling):
    params = lively()
    (text,) = generate(params, TINY, prompt, n, seed=seed, sampling=sampling)
    assert text == recomputed_bytes(params, TINY, prompt, n, seed, 0, sampling)


@settings(max_examples=15)
@given(prompt=st.binary(max_size=20), n=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_sample_is_the_same_alone_and_in_any_batch(prompt, n, seed):
    params = lively()
    batch = generate(params, TINY, prompt, 12, seed=seed, samples=range(n))
    assert batch == [
        generate(params, TINY, prompt, 12, seed=seed, samples=[i])[0] for i in range(n)
    ]
    assert batch[::-1] == generate(params, TINY, prompt, 12, seed=seed, samples=range(n)[::-1])


def test_samples_and_seeds_differ():
    params = lively()
    texts = generate(params, TINY, b"a", 30, samples=range(4))
    texts += generate(params, TINY, b"a", 30, seed=1, samples=range(4))
    assert len(set(texts)) == 8


def test_a_shorter_run_is_the_start_of_a_longer_one():
    params = lively()
    short, long = (generate(params, TINY, b"ab", n, samples=[3]) for n in (7, 25))
    assert long[0].startswith(short[0])
    assert len(long[0]) == 25


@given(prompt=st.binary(min_size=1, max_size=20), a=st.integers(0, 9), b=st.integers(0, 9))
def test_greedy_text_goes_on_where_it_stopped(prompt, a, b):
    params, greedy = lively(), Sampling(temperature=0)
    (first,) = generate(params, TINY, prompt, a, sampling=greedy)
    (second,) = generate(params, TINY, prompt + first, b, sampling=greedy)
    assert generate(params, TINY, prompt, a + b, sampling=greedy) == [first + second]


def test_an_empty_prompt_begins_with_a_new_line():
    params = lively()
    assert generate(params, TINY, b"", 20) == generate(params, TINY, START, 20)


def test_of_a_long_prompt_only_the_window_matters():
    params, tail = lively(), bytes(range(TINY.T))
    n = TINY.T + 3 * (TINY.T // 2)
    assert window_start(n, TINY.T) == n - TINY.T
    texts = {generate(params, TINY, head * (n - TINY.T) + tail, 9)[0] for head in (b"a", b"b")}
    assert len(texts) == 1


def test_nothing_to_generate_is_an_empty_text_for_each_sample():
    assert generate(lively(), TINY, b"a", 0, samples=range(3)) == [b"", b"", b""]


def test_generation_touches_no_global_randomness():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generate(lively(), TINY, b"a", 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_vocabulary_beyond_the_bytes_is_never_drawn():
    cfg = ModelConfig(V=400, T=8, C=12, L=1, H=2, d_ff=16)
    params = lively(cfg)
    texts = generate(params, cfg, b"a", 50, samples=range(4), sampling=Sampling(1e6))
    assert all(len(text) == 50 for text in texts)


def test_a_stream_comes_byte_by_byte():
    params = lively()
    steps = list(stream(params, TINY, b"a", 4, samples=range(3)))
    assert [len(step) for step in steps] == [3] * 4
    assert [bytes(c) for c in zip(*steps, strict=True)] == generate(
        params, TINY, b"a", 4, samples=range(3)
    )


# --- drawing -----------------------------------------------------------------------------------

values = st.floats(-50, 50, width=32) | st.floats(-(2.0**127), 2.0**127, width=32)
logit_rows = st.lists(values, min_size=1, max_size=12).map(lambda row: torch.tensor([row]))
samplings = st.builds(
    Sampling,
    temperature=st.floats(0, allow_nan=False, allow_infinity=False),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
)


def ranked(logits):
    return logits[0].sort(descending=True, stable=True).indices.tolist()


@given(logits=logit_rows, sampling=samplings)
def test_a_distribution_is_one_whatever_the_settings(logits, sampling):
    probs = distribution(logits, sampling)
    assert probs.isfinite().all()
    assert (probs >= 0).all()
    torch.testing.assert_close(probs.sum(), torch.tensor(1.0))
    assert probs[0, ranked(logits)[0]] > 0


@given(logits=logit_rows, k=st.integers(1, 15), temperature=st.floats(0.1, 10))
def test_top_k_keeps_the_k_likeliest(logits, k, temperature):
    probs = distribution(logits, Sampling(temperature, top_k=k))[0]
    free = distribution(logits, Sampling(temperature))[0]
    order = ranked(logits)
    kept = torch.zeros_like(free)
    kept[order[:k]] = free[order[:k]]
    torch.testing.assert_close(probs, kept / kept.sum())


@given(logits=logit_rows, p=st.floats(0, 1, exclude_min=True), temperature=st.floats(0.1, 10))
def test_top_p_keeps_the_fewest_that_reach_p_with_the_one_that_crosses(logits, p, temperature):
    probs = distribution(logits, Sampling(temperature, top_p=p))[0]
    free = distribution(logits, Sampling(temperature))[0]
    order = ranked(logits)
    n_kept = int((probs > 0).sum())
    assert (probs[order[:n_kept]] > 0).all()
    share = free[order].cumsum(0)
    assert n_kept == len(order) or share[n_kept - 1] >= p or free[order[n_kept]] == 0
    assert n_kept == 1 or share[n_kept - 2] < p


def test_top_p_of_a_known_distribution():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    for p, kept in [(1e-30, [1]), (0.5, [1]), (0.51, [1, 3]), (0.76, [1, 2, 3]), (1, [0, 1, 2, 3])]:
        probs = distribution(logits, Sampling(top_p=p))[0]
        assert probs.nonzero().flatten().tolist() == kept


def test_top_p_is_taken_of_what_top_k_left():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    probs = distribution(logits, Sampling(top_k=2, top_p=0.57))[0]  # 0.4 of 0.7 is 0.571
    assert probs.tolist() == [1, 0, 0, 0]


@given(logits=logit_rows)
def test_the_limits_of_temperature(logits):
    best = ranked(logits)[0]
    for cold in (0.0, 1e-300, 1e-45):
        assert distribution(logits, Sampling(cold)).argmax() == best
        assert distribution(logits, Sampling(cold)).max() == 1
    one = distribution(logits, Sampling())
    torch.testing.assert_close(one, logits.softmax(-1))
    hot = distribution(logits, Sampling(1e300))
    torch.testing.assert_close(hot, torch.full_like(hot, 1 / hot.shape[-1]))


@given(logits=logit_rows, uniform=st.floats(0, 1, exclude_max=True, width=32))
def test_top_1_is_greedy(logits, uniform):
    u = torch.tensor([uniform])
    assert invert_cdf(distribution(logits, Sampling(top_k=1)), u) == ranked(logits)[0]
    assert invert_cdf(distribution(logits, Sampling(0)), u) == ranked(logits)[0]


@given(
    weights=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=300).filter(any),
    uniform=st.floats(0, 1, exclude_max=True, width=32) | st.just(1 - 2**-24),
)
def test_nothing_of_probability_0_is_drawn(weights, uniform):
    probs = torch.tensor([weights])
    probs = probs / probs.sum()
    drawn = invert_cdf(probs, torch.tensor([uniform]))
    assert probs[0, drawn] > 0


def test_draws_have_the_distribution():
    probs = torch.tensor([0.05, 0.0, 0.6, 0.35])
    uniforms = (torch.arange(1000) + 0.5) / 1000
    drawn = invert_cdf(probs.expand(1000, -1), uniforms)
    assert drawn.bincount(minlength=4).tolist() == [50, 0, 600, 350]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_model_that_has_blown_up_is_told(bad):
    with pytest.raises(ValueError, match="not finite"):
        distribution(torch.tensor([[0.0, bad]]), Sampling())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_k", -3),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
    ],
)
def test_settings_out_of_range_are_refused_by_name_and_value(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .* got {value}"):
        Sampling(**{field: value})


# --- text --------------------------------------------------------------------------------------


@st.composite
def cut_up(draw, data):
    """Cut bytes at arbitrary places."""
    whole = draw(data)
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    return [whole[a:b] for a, b in pairwise([0, *cuts, len(whole)])]


@example([b"cut short: \xe2", b"\x82"])
@given(cut_up(st.binary(max_size=60) | st.text(max_size=20).map(str.encode)))
def test_streamed_text_is_the_text(chunks):
    assert "".join(decode_stream(chunks)) == b"".join(chunks).decode("utf-8", errors="replace")


@given(st.text(alphabet=st.characters(exclude_characters="�", exclude_categories=["Cs"])))
def test_no_character_is_shown_broken_that_later_bytes_complete(text):
    data = text.encode()
    chunks = [data[i : i + 1] for i in range(len(data))]
    assert "�" not in "".join(decode_stream(chunks))
    assert list(decode_stream(chunks)) == list(text)


def test_a_character_comes_with_its_last_byte():
    pieces = decode_stream(iter(chunks := [b"\xe2", b"\x82", b"\xac", b"x"]))
    assert next(pieces) == "€"
    assert next(pieces) == "x"
    assert len(chunks) == 4
