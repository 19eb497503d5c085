"""What a state tells, each figure against a computation without tricks on a tiny model."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call, grad, jacrev

from niels_gpt import ModelConfig, evaluate, insight
from niels_gpt.data.roam import list_roam_paths
from niels_gpt.dropout import dropout_keys, sites
from niels_gpt.eval import eval_batches
from niels_gpt.loss import gradients, loss
from niels_gpt.state import empty_model, to_modules
from niels_gpt.streams import StreamBuildConfig
from tests.training import SMALL, copy_of, random_batch, same_state, trained_state

TINY = ModelConfig(V=16, T=8, C=4, L=1, H=1, d_ff=4, dropout=0.0)
STREAM = bytes((i * i + i // 7) % 16 for i in range(2000))


@pytest.fixture(scope="module")
def state():
    return trained_state(TINY, B=4)


def flat_gradient(model, x, y):
    """Differentiate the plain module, on one batch, backwards."""
    model.zero_grad()
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def row_gradients(state, x, y):
    model, _ = to_modules(state)
    model.eval()
    return torch.stack([flat_gradient(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])


# --- gradient noise ----------------------------------------------------------------------------


def test_row_products_are_those_of_the_gradients_of_single_rows(state):
    x, y = random_batch(9, 8, V=16)
    squares, products = insight.row_products(state.params, (x, y), TINY)
    g = row_gradients(state, x, y)
    torch.testing.assert_close(torch.tensor(squares), g.square().sum(1), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(torch.tensor(products), g @ g.mean(0), rtol=1e-4, atol=1e-7)


def test_row_products_take_the_dropout_of_each_row():
    state = trained_state(SMALL)
    x, y = random_batch(3)
    drop = dropout_keys(1, 2, range(3), sites(SMALL.L))
    squares, products = insight.row_products(state.params, (x, y), SMALL, drop)
    rows = [gradients(state.params, (x[i:][:1], y[i:][:1]), SMALL, drop[i:][:1]) for i in range(3)]
    g = torch.stack([insight.to_vector(grads) for grads, _ in rows])
    torch.testing.assert_close(torch.tensor(squares), g.square().sum(1), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(torch.tensor(products), g @ g.mean(0), rtol=1e-4, atol=1e-7)


def test_the_noise_scale_is_trace_over_square_without_bias(state):
    x, y = random_batch(9, 8, V=16)
    found = insight.noise_scale(*insight.row_products(state.params, (x, y), TINY))
    g = row_gradients(state, x, y)
    covariance = torch.cov(g.T)
    assert math.isclose(found.variance, covariance.trace().item(), rel_tol=1e-3)
    signal = (g.mean(0).square().sum() - covariance.trace() / 9).item()
    assert math.isclose(found.signal, signal, rel_tol=1e-2, abs_tol=1e-6)
    between = [(g[i] @ g[j]).item() for i in range(9) for j in range(9) if i != j]
    assert math.isclose(found.signal, sum(between) / 72, rel_tol=1e-2, abs_tol=1e-6)


def products_of(g):
    return g.square().sum(1).tolist(), (g @ g.mean(0)).tolist()


def test_the_interval_uses_what_each_left_out_row_gives():
    g = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) + 1.0
    without = []
    for i in range(12):
        rest = torch.cat((g[:i], g[i + 1 :]))
        s = insight.noise_scale(*products_of(rest))
        without.append((s.variance, s.signal))
    whole = insight.noise_scale(*products_of(g))
    wanted = insight._ratio_interval(whole.variance, whole.signal, *insight._jackknife(without))
    assert [whole.low, whole.high] == pytest.approx(wanted, rel=1e-3)


def test_the_interval_covers_a_known_noise_scale_about_95_times_in_100():
    """Gaussian gradients of 40 parameters, |G|^2 = 1, tr(Sigma) = 40 * 0.25 = 10."""
    generator = torch.Generator().manual_seed(7)
    G = torch.ones(40) / 40**0.5
    covered, middle = 0, []
    for _ in range(200):
        g = G + 0.5 * torch.randn(64, 40, generator=generator)
        found = insight.noise_scale(*products_of(g))
        covered += found.low <= 10.0 <= found.high
        middle.append(found.scale)
        assert found.low <= found.scale <= found.high
    assert 180 <= covered <= 199
    assert 9.5 < sorted(middle)[100] < 10.5


def test_pure_noise_has_no_upper_end():
    g = torch.randn(64, 40, generator=torch.Generator().manual_seed(1))
    found = insight.noise_scale(*products_of(g))
    assert found.high == math.inf
    with pytest.raises(ValueError, match="3 rows"):
        insight.noise_scale([1.0, 1.0], [1.0, 1.0])


def test_coming_rows_are_the_next_batches_of_the_run():
    from niels_gpt.step import batch_of_step, dropout_of_step

    state = trained_state(SMALL, B=2)
    sources, p = {"wiki": STREAM}, {"wiki": 1.0}
    (x, y), drop = insight.coming_rows(state, sources, p, 3)
    for i in range(3):
        wanted = batch_of_step(42, 3 + i, sources, p=p, B=2, T=12)
        assert torch.equal(x[2 * i : 2 * i + 2], wanted[0])
        assert torch.equal(y[2 * i : 2 * i + 2], wanted[1])
        keys = dropout_of_step(42, 3 + i, range(2), SMALL)
        assert torch.equal(drop[2 * i : 2 * i + 2], keys)


# --- curvature ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_hessian(state):
    """The Hessian as a matrix, from the plain module, and the batch that it belongs to.

    Reverse over reverse: `torch.func.hessian` (vmapped forward over reverse, torch 2.13) is off in
    the rows of LayerNorm weights, and is not symmetric.
    """
    batch = random_batch(6, 8, V=16)
    model = empty_model(TINY).eval()

    def loss_of(vector):
        params = insight.to_tree(vector, state.params)
        logits = functional_call(model, params, (batch[0],))
        return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())

    return jacrev(grad(loss_of))(insight.to_vector(state.params)), batch


def random_vector(state, seed=0):
    vector = insight.to_vector(state.params)
    return torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed))


def test_hessian_products_are_those_of_the_matrix(state, whole_hessian):
    H, batch = whole_hessian
    v = random_vector(state)
    found = insight.hessian_product(state.params, insight.to_tree(v, state.params), batch, TINY)
    torch.testing.assert_close(insight.to_vector(found), H @ v, rtol=1e-3, atol=1e-5)


def test_hessian_products_add_up_over_blocks_of_rows(state, whole_hessian, monkeypatch):
    H, batch = whole_hessian
    monkeypatch.setattr("niels_gpt.loss.ROW_BLOCK", 16)  # 3 blocks of 2 rows
    v = random_vector(state)
    found = insight.hessian_product(state.params, insight.to_tree(v, state.params), batch, TINY)
    torch.testing.assert_close(insight.to_vector(found), H @ v, rtol=1e-3, atol=1e-5)


def test_lanczos_says_whether_it_has_converged():
    A = torch.arange(1.0, 101.0)
    start = torch.ones(100)
    early = insight.largest_eigenvalue(lambda v: A * v, start, iterations=3)
    assert not early.converged
    assert early.value < 100
    assert insight.largest_eigenvalue(lambda v: A * v, start, iterations=60).converged


def test_without_moments_the_sharpness_under_adam_is_not_known(state):
    zeros = {name: torch.zeros_like(p) for name, p in state.params.items()}
    found = insight.curvature(state._replace(nu=zeros), {"s": STREAM}, {"s": 1.0}, iterations=3)
    assert (found.adam, found.adam_lr) == (None, None)


def test_sharpness_is_the_largest_eigenvalue_of_the_matrix(state, whole_hessian):
    H, batch = whole_hessian
    top = torch.linalg.eigvalsh((H + H.T) / 2)[-1].item()
    found = insight.sharpness(state.params, batch, TINY, random_vector(state), iterations=40)
    assert math.isclose(found.value, top, rel_tol=0.01)
    assert found.error <= 0.01 * found.value


def test_sharpness_under_adam_is_that_of_the_scaled_matrix(state, whole_hessian):
    H, batch = whole_hessian
    nu_hat = torch.cat([v.flatten() for v in state.nu.values()]) / (1 - 0.95**state.step)
    P = nu_hat.sqrt() + 1e-8
    D = torch.diag(P**-0.5)
    top = torch.linalg.eigvalsh(D @ ((H + H.T) / 2) @ D)[-1].item()
    scale = insight.adam_scale(state)
    found = insight.sharpness(
        state.params, batch, TINY, random_vector(state), scale=scale, iterations=60
    )
    assert math.isclose(found.value, top, rel_tol=0.02)


@given(st.integers(1, 12), st.integers(0, 1000))
def test_lanczos_finds_the_top_of_any_symmetric_matrix(n, seed):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=generator)
    A = A + A.T
    start = torch.randn(n, generator=generator)
    found = insight.largest_eigenvalue(lambda v: A @ v, start, iterations=n, tolerance=0.0)
    top = torch.linalg.eigvalsh(A)[-1].item()
    assert math.isclose(found.value, top, rel_tol=1e-3, abs_tol=1e-3)
    assert found.products <= n


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_a_quadratic_converges_below_the_largest_lr_and_diverges_above(momentum):
    curvature = 3.0
    bound = insight.largest_lr(curvature, momentum)

    def distance(lr):
        x, m = 1.0, 0.0
        for _ in range(4000):
            m = momentum * m + (1 - momentum) * curvature * x
            x -= lr * m
        return abs(x)

    assert distance(0.99 * bound) < 1e-3
    assert distance(1.01 * bound) > 1e3
    assert insight.largest_lr(curvature) == 2 / 3
    assert math.isclose(insight.largest_lr(1.0, 0.9), 38)
    assert insight.largest_lr(-1.0) == math.inf


# --- documents ---------------------------------------------------------------------------------

NOTES = [
    ("long", bytes(i % 16 for i in range(100))),
    ("exact", bytes(i * i % 16 for i in range(9))),
    ("short", bytes([3, 1, 4])),
    ("pair", bytes([15, 0])),
]


def test_influences_are_products_with_the_gradient_of_each_document(state):
    v, unit = insight.validation_gradient(state, STREAM, 2)
    found = insight.influences(state.params, v, NOTES, TINY, unit=unit, windows=100)
    model, _ = to_modules(state)
    model.eval()
    flat_v = insight.to_vector(v)
    for influence, (name, text) in zip(found, NOTES, strict=True):
        pieces = insight.cut(text, 8, 100)
        total, count = 0.0, 0
        for piece in pieces:
            ids = torch.tensor([list(piece)])
            g = flat_gradient(model, ids[:, :-1], ids[:, 1:])
            total += (g @ flat_v).item() * (len(piece) - 1)
            count += len(piece) - 1
        wanted = total / count / unit
        assert (influence.name, influence.nbytes) == (name, len(text))
        assert math.isclose(influence.value, wanted, rel_tol=1e-3, abs_tol=1e-5)


def test_an_influence_is_what_a_small_step_does_to_the_validation_loss(state):
    """Central differences: train on a document, a little, forwards and backwards."""
    batch = insight_batch(state)
    v = gradients(state.params, batch, TINY)[0]
    square = insight.to_vector(v).square().sum().item()
    for name, text in NOTES[1:3]:
        (found,) = insight.influences(state.params, v, [(name, text)], TINY, unit=square)
        ids = torch.tensor([list(text)])
        g, _ = gradients(state.params, (ids[:, :-1], ids[:, 1:]), TINY)
        lr = 0.002 / insight.to_vector(g).norm().item()
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
    v, unit = insight.validation_gradient(state, STREAM, 2)
    model, _ = to_modules(state)
    model.eval()
    wanted = flat_gradient(model, *insight_batch(state)).clone()
    torch.testing.assert_close(insight.to_vector(v), wanted, rtol=1e-3, atol=1e-6)
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
        v, unit = insight.validation_gradient(state, text, 1)
        ratios.append(unit / insight.to_vector(v).square().sum().item())
    assert abs(sum(ratios) / 20) < 0.5


def test_a_validation_gradient_lost_in_noise_is_said(state, monkeypatch):
    v, _ = insight.validation_gradient(state, STREAM, 1)
    monkeypatch.setattr(insight, "validation_gradient", lambda *_: (v, -0.1))
    with pytest.raises(ValueError, match="lost in their noise: take more"):
        insight.notes_worth(state, STREAM, NOTES)


@given(st.binary(min_size=2, max_size=200), st.integers(1, 20), st.integers(1, 8))
def test_pieces_lie_in_the_text_and_are_as_many_and_as_long_as_asked(text, T, windows):
    pieces = insight.cut(text, T, windows)
    assert 1 <= len(pieces) <= windows
    assert all(piece in text and 2 <= len(piece) <= T + 1 for piece in pieces)
    if len(text) <= windows * (T + 1) and windows > 1:  # then nothing is left out
        covered = sum(map(len, pieces))
        assert covered >= len(text)
        assert text.startswith(pieces[0])
        assert text.endswith(pieces[-1])


def test_notes_of_the_validation_split_are_not_scored(texts):
    cfg = StreamBuildConfig(roam_root=texts / "notes")
    notes = insight.training_notes(cfg, 42)
    names = {str(path.relative_to(texts / "notes")) for path in list_roam_paths(texts / "notes")}
    assert {name for name, _ in notes} < names
    assert len(notes) == len(names) - 1
    for name, text in notes:
        assert (texts / "notes" / name).read_bytes() == text
    with pytest.raises(ValueError, match="no notes"):
        insight.training_notes(cfg, 42, min_bytes=10**6)


def test_nothing_is_changed(state):
    before = copy_of(state)
    batch = random_batch(3, 8, V=16)
    v, _ = insight.validation_gradient(state, STREAM, 1)
    insight.row_products(state.params, batch, TINY)
    insight.sharpness(state.params, batch, TINY, random_vector(state), iterations=2)
    insight.influences(state.params, v, NOTES, TINY, unit=1.0)
    assert same_state(state, before)
