"""The step: pure, reproducible, equal to the plain loop, made of parts that can be recomposed.

Each test states a law that users rely on when they sweep, resume, replay or split a step.
"""

import dataclasses
import hashlib
import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

from niels_gpt import (
    TrainConfig,
    TrainState,
    evaluate,
    from_modules,
    make_state,
    to_modules,
    train_step,
)
from niels_gpt.batching import get_batch
from niels_gpt.loss import gradients
from niels_gpt.model.dropout import dropout_keys, sites
from niels_gpt.optim import optimizer_of
from niels_gpt.optim.clip import clip_by_global_norm
from niels_gpt.optim.trees import map_tensors
from niels_gpt.rng import keyed_generator
from niels_gpt.step import batch_of_step, dropout_of_step, loop_step
from tests import ROOT
from tests.strategies import model_configs, train_configs
from tests.test_state import imperative_step
from tests.training import (
    ACCELERATORS,
    PLAIN,
    SMALL,
    assert_close_trees,
    copy_of,
    random_batch,
    same_bits,
    same_state,
    tensors,
    trained_state,
)

STREAM = bytes(random.Random(0).choices(range(256), k=400))


def run(state, steps, *, lr=0.01):
    """Take `steps` steps on the batches of their numbers."""
    for _ in range(steps):
        batch = random_batch(T=state.model_cfg.T, seed=state.step)
        state, _ = train_step(state, batch, lr)
    return state


# --- purity -------------------------------------------------------------------------------------


@given(model_configs(), train_configs(), st.integers(1, 3))
@settings(max_examples=10)
def test_arguments_are_unchanged_bit_for_bit(model_cfg, train_cfg, B):
    state = trained_state(model_cfg, **vars(train_cfg))
    batch, lr = random_batch(B, model_cfg.T), torch.tensor(0.01)
    state_before, (x, y), lr_before = copy_of(state), [t.clone() for t in batch], lr.clone()
    new_state, metrics = train_step(state, batch, lr)
    train_step(new_state, batch, lr)
    assert same_state(state, state_before)
    assert torch.equal(batch[0], x)
    assert torch.equal(batch[1], y)
    assert same_bits(lr, lr_before)
    assert new_state[2:] == (state.step + 1, model_cfg, train_cfg)
    assert all(m.isfinite() for m in metrics.values())


def test_the_new_state_shares_no_memory_with_the_arguments():
    """Not even at learning rate 0 and with nothing to clip, where it could be the old values."""
    state, batch, lr = trained_state(grad_clip=1e6), random_batch(), torch.tensor(0.0)
    new_state, metrics = train_step(state, batch, lr)
    old = {t.untyped_storage().data_ptr() for t in (*tensors(state).values(), *batch, lr)}
    new = [
        t.untyped_storage().data_ptr() for t in (*tensors(new_state).values(), *metrics.values())
    ]
    assert not old & set(new)
    assert len(set(new)) == len(new)
    assert new_state.params is not state.params


def test_global_generators_are_neither_read_nor_changed():
    state, batch = trained_state(B=2, eval_steps=2), random_batch()
    outcomes = []
    with torch.random.fork_rng():
        python_before = random.getstate()
        for seed in (1, 2):
            torch.manual_seed(seed)
            random.seed(seed)
            before = torch.get_rng_state(), random.getstate()
            outcomes.append(train_step(state, batch, 0.01)[0])
            evaluate(state, STREAM, seed=3)
            assert torch.equal(torch.get_rng_state(), before[0])
            assert random.getstate() == before[1]
        random.setstate(python_before)
    assert same_state(*outcomes)


def test_a_step_depends_on_its_arguments_alone():
    """Other steps, evaluations and other models in between change nothing."""
    state, batch = trained_state(), random_batch(seed=9)
    expected, _ = train_step(copy_of(state), batch, 0.01)
    run(trained_state(seed=5), 2)
    run(trained_state(PLAIN), 1)
    evaluate(trained_state(B=2, eval_steps=2), STREAM, seed=1)
    assert same_state(train_step(state, batch, 0.01)[0], expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_grad_mode_around_a_step_does_not_matter(context):
    state, batch = trained_state(), random_batch()
    expected, _ = train_step(state, batch, 0.01)
    with context():
        got, _ = train_step(state, batch, 0.01)
    assert same_state(got, expected)
    assert not any(t.requires_grad for t in tensors(got).values())


@given(model_configs(), train_configs(), st.integers(1, 3), st.sampled_from(["adamw", "muon"]))
@settings(max_examples=15)
def test_the_loops_step_has_the_bits_of_the_step(model_cfg, train_cfg, B, optimizer):
    """In several blocks of rows too; its arguments are unchanged, and no graph is kept."""
    state = trained_state(model_cfg, **{**vars(train_cfg), "optimizer": optimizer})
    batch, before = random_batch(B, model_cfg.T), copy_of(state)
    expected, metrics = train_step(state, batch, 0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("niels_gpt.loss.ROW_BLOCK", max(1, (B - 1) * model_cfg.T))
        in_blocks, _ = train_step(state, batch, 0.01)
        assert same_state(loop_step(state, batch, 0.01)[0], in_blocks)
    got, got_metrics = loop_step(state, batch, 0.01)
    assert same_state(got, expected)
    assert all(same_bits(got_metrics[name], value) for name, value in metrics.items())
    assert same_state(state, before)
    assert not any(t.requires_grad for t in [*tensors(got).values(), *got_metrics.values()])


def test_nothing_waits_for_the_device():
    """Metrics stay tensors: reading one would make the host wait for the whole step."""

    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "a number was read"
            assert func is not torch.ops.aten.nonzero.default, "a shape depends on values"
            return func(*args, **(kwargs or {}))

    state, batch, lr = trained_state(), random_batch(), torch.tensor(0.01)
    with NoSync():
        train_step(state, batch, lr)
        with pytest.raises(AssertionError, match="read"):
            lr.item()


def test_metrics_are_scalars():
    _, metrics = train_step(trained_state(), random_batch(), 0.01)
    assert metrics.keys() >= {"loss", "grad_norm"}
    for m in metrics.values():
        assert isinstance(m, torch.Tensor)
        assert (m.shape, m.dtype, m.requires_grad) == ((), torch.float32, False)


# --- reproducibility ----------------------------------------------------------------------------


def digest():
    """Return a digest of every bit of a few steps and an evaluation."""
    state = run(make_state(SMALL, TrainConfig(seed=3, B=2, eval_steps=2)), 3)
    sha = hashlib.sha256()
    for name, t in tensors(state).items():
        sha.update(name.encode())
        sha.update(bytes(t.contiguous().view(torch.uint8).flatten().tolist()))
    batch = batch_of_step(3, 5, {"a": STREAM, "b": STREAM[::-1]}, p={"a": 0.5, "b": 0.5}, B=4, T=9)
    sha.update(repr((batch[0].tolist(), evaluate(state, STREAM, seed=4))).encode())
    return sha.hexdigest()


def test_another_process_with_other_hashes_gets_the_same_bits():
    root = str(ROOT)
    # Threads split sums: the same number of them here and there.
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()});"
        "from tests.test_step import digest; print(digest())"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == digest()


@given(st.integers(0, 3), st.integers(0, 3), train_configs())
@settings(max_examples=10)
def test_a_run_can_be_cut_anywhere(a, b, train_cfg):
    """run(a + b) == run(b) after run(a), also when the state is rebuilt from copies between."""
    whole = run(make_state(SMALL, train_cfg), a + b)
    first = run(make_state(SMALL, train_cfg), a)
    assert same_state(run(copy_of(first), b), whole)


def test_evaluations_between_steps_leave_the_run_alone():
    state = make_state(SMALL, TrainConfig(B=2, eval_steps=2))
    plain = run(state, 4)
    for k in range(4):
        for _ in range(k):
            evaluate(state, STREAM, seed=k)
        state = run(state, 1)
    assert same_state(state, plain)


def test_the_seed_and_the_step_decide_the_dropout():
    state, batch = trained_state(), random_batch()
    first = train_step(state, batch, 0.01)[1]["loss"]
    other_step = train_step(state._replace(step=9), batch, 0.01)[1]["loss"]
    other_seed = dataclasses.replace(state.train_cfg, seed=1)
    seeded = train_step(state._replace(train_cfg=other_seed), batch, 0.01)[1]["loss"]
    assert len({first.item(), other_step.item(), seeded.item()}) == 3


# --- parity -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grad_clip", "name"), [(0.05, "adamw"), (1.0, "adamw"), (100.0, "adamw"), (1.0, "muon")]
)
def test_without_dropout_the_trajectory_is_the_plain_loops(grad_clip, name):
    """24 steps of GPT, clip_grad_norm_ and the torch.optim form, on batches of several blocks."""
    cfg = dataclasses.replace(PLAIN, T=80)
    state = make_state(cfg, TrainConfig(grad_clip=grad_clip, optimizer=name))
    model, optimizer = to_modules(state)
    clipped = 0
    for k in range(24):
        batch, lr = random_batch(B=14, T=80, seed=k, V=40), 1e-3 * (1 + k % 5)
        state, metrics = train_step(state, batch, lr)
        loss, norm = imperative_step(model, optimizer, batch, lr=lr, grad_clip=grad_clip)
        torch.testing.assert_close(metrics["loss"], loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(metrics["grad_norm"], norm, rtol=1e-3, atol=1e-5)
        clipped += bool(norm > grad_clip)
    theirs = {name: p.detach() for name, p in model.named_parameters()}
    assert_close_trees(state.params, theirs, rtol=1e-3, atol=1e-4)
    moments = {n: optimizer.state[p] for n, p in model.named_parameters()}
    for field, tree in state.opt_state._asdict().items():
        assert_close_trees(tree, {n: moments[n][field] for n in tree}, atol=1e-5)
    assert {int(m["step"]) for m in moments.values()} == {state.step} == {24}
    assert (clipped > 0) == (grad_clip < 100)
    assert loss < 4.8  # from ln 256 towards ln 40


def test_a_step_is_the_composition_of_its_parts():
    state, batch, lr = trained_state(weight_decay=0.3, grad_clip=0.1), random_batch(), 0.01
    params, opt_state, step, cfg, train_cfg = state
    drop = dropout_of_step(train_cfg.seed, step, range(4), cfg)
    grads, loss = gradients(params, batch, cfg, drop)
    grads, norm = clip_by_global_norm(grads, 0.1)
    update = optimizer_of(train_cfg).update
    trees = update(params, grads, opt_state, count=step + 1, lr=lr, weight_decay=0.3)
    new_state, metrics = train_step(state, batch, lr)
    assert same_state(new_state, TrainState(*trees, step + 1, cfg, train_cfg))
    assert same_bits(metrics["loss"], loss)
    assert same_bits(metrics["grad_norm"], norm)
    assert norm > 0.1


@given(st.integers(2, 9), st.data())
@settings(max_examples=10)
def test_micro_batches_make_the_step_of_the_whole_batch(B, data):
    """With dropout, for any split by rows: the keys of a row go with the row."""
    state, (x, y) = trained_state(), random_batch(B)
    cuts = data.draw(st.lists(st.integers(1, B - 1), unique=True).map(sorted))
    params, opt_state, step, cfg, train_cfg = state
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    for start, stop in zip([0, *cuts], [*cuts, B], strict=True):
        drop = dropout_of_step(train_cfg.seed, step, range(start, stop), cfg)
        grads, _ = gradients(params, (x[start:stop], y[start:stop]), cfg, drop)
        total = {n: t + grads[n] * (stop - start) / B for n, t in total.items()}
    clipped, norm = clip_by_global_norm(total, train_cfg.grad_clip)
    whole, metrics = train_step(state, (x, y), 0.01)
    torch.testing.assert_close(norm, metrics["grad_norm"], rtol=1e-4, atol=1e-6)
    new_params, new_opt_state = optimizer_of(train_cfg).update(
        params, clipped, opt_state, count=step + 1, lr=0.01, weight_decay=train_cfg.weight_decay
    )
    for found, expected in zip(new_opt_state, whole.opt_state, strict=True):
        assert_close_trees(found, expected)
    assert_close_trees(new_params, whole.params, atol=1e-5)


@given(st.floats(0, 1, width=32))
@settings(max_examples=8)
def test_the_learning_rate_may_be_a_number_or_a_tensor(lr):
    state, batch = trained_state(), random_batch()
    by_number, metrics = train_step(state, batch, lr)
    by_tensor, tensor_metrics = train_step(state, batch, torch.tensor(lr))
    assert_close_trees(tensors(by_number), tensors(by_tensor), rtol=1e-5, atol=1e-6)
    assert_close_trees(metrics, tensor_metrics, rtol=0, atol=0)


# --- transforms ---------------------------------------------------------------------------------

AXES = TrainState(0, 0, None, None, None)


def stack(states):
    return map_tensors(lambda *members: torch.stack(members), *states)


def member(state, i):
    return map_tensors(lambda t: t[i], state)


@pytest.mark.parametrize(("cfg", "name"), [(SMALL, "adamw"), (PLAIN, "adamw"), (PLAIN, "muon")])
def test_a_mapped_step_is_each_members_own(cfg, name):
    """Stacked states and mapped learning rates, over several blocks of rows."""
    alone = [trained_state(cfg, steps=k, optimizer=name)._replace(step=1) for k in (1, 2, 3)]
    stacked, lrs = stack(alone), torch.tensor([0.0, 0.01, 0.1])
    step = vmap(train_step, in_dims=(AXES, None, 0), out_dims=(AXES, 0))
    for k in range(3):
        batch = random_batch(B=100, seed=k)
        stacked, metrics = step(stacked, batch, lrs)
        outcomes = [train_step(s, batch, lr) for s, lr in zip(alone, lrs, strict=True)]
        alone = [s for s, _ in outcomes]
        for i, (s, m) in enumerate(outcomes):
            assert_close_trees(tensors(member(stacked, i)), tensors(s), rtol=1e-4, atol=1e-5)
            assert_close_trees({n: v[i] for n, v in metrics.items()}, m, rtol=1e-4, atol=1e-5)
    assert stacked.step == 4


def test_a_mapped_step_takes_a_batch_for_each_member():
    alone, batches = [trained_state()] * 2, [random_batch(seed=k) for k in (1, 2)]
    stacked_batch = tuple(map(torch.stack, zip(*batches, strict=True)))
    step = vmap(train_step, in_dims=(AXES, 0, None), out_dims=(AXES, 0))
    stacked, _ = step(stack(alone), stacked_batch, 0.01)
    for i in range(2):
        expected, _ = train_step(alone[i], batches[i], 0.01)
        assert_close_trees(tensors(member(stacked, i)), tensors(expected), atol=1e-5)


def test_the_first_step_of_a_config_may_be_a_mapped_one():
    """Whatever is built and kept for a config is built outside of the transform."""
    cfg = dataclasses.replace(SMALL, d_ff=23)  # used nowhere else
    state, batch, lrs = make_state(cfg, TrainConfig()), random_batch(), torch.tensor([0.1, 0.2])
    mapped = vmap(lambda lr: train_step(state, batch, lr)[1]["loss"])(lrs)
    expected = train_step(state, batch, 0.1)[1]["loss"]
    torch.testing.assert_close(mapped, expected.expand(2))


def test_a_step_can_be_differentiated_by_its_learning_rate():
    """Forward mode through gradient, clip and update: the slope of the loss after the step."""
    state, batch = trained_state(PLAIN), random_batch()

    def later_loss(lr):
        return train_step(train_step(state, batch, lr)[0], batch, lr)[1]["loss"]

    lr, eps = torch.tensor(0.01), 2e-3
    _, slope = torch.func.jvp(later_loss, (lr,), (torch.tensor(1.0),))
    expected = (later_loss(lr + eps) - later_loss(lr - eps)) / (2 * eps)
    assert slope.item() == pytest.approx(expected.item(), rel=0.1)
    assert slope < 0


# --- what a step takes --------------------------------------------------------------------------


@given(model_configs(), train_configs(), st.integers(1, 5), st.data())
@settings(max_examples=30)
def test_any_legal_config_and_batch_takes_a_step(model_cfg, train_cfg, B, data):
    T = data.draw(st.integers(1, model_cfg.T))
    state = make_state(model_cfg, train_cfg)
    new_state, metrics = train_step(state, random_batch(B, T), 0.01)
    assert all(t.isfinite().all() for t in tensors(new_state).values())
    assert 0 < metrics["loss"] < 50
    assert metrics["grad_norm"] >= 0
    assert new_state.step == 1
    assert list(tensors(new_state)) == list(tensors(state))


def test_a_context_longer_than_the_configs_is_refused():
    with pytest.raises(ValueError, match="T <= 12"):
        train_step(trained_state(), random_batch(2, 13), 0.01)


def test_a_few_rows_are_learned_by_heart():
    state, batch = make_state(SMALL, TrainConfig()), random_batch(2)
    losses = []
    for _ in range(60):
        state, metrics = train_step(state, batch, 0.01)
        losses.append(metrics["loss"].item())
    assert losses[0] == pytest.approx(5.545, abs=0.1)
    assert losses[-1] < 2


@pytest.mark.parametrize("device", ACCELERATORS)
def test_an_accelerator_takes_the_same_steps(device):
    """From the same weights, on the same batches, under the same masks, to rounding."""
    train_cfg = TrainConfig(B=2, eval_steps=2)
    here, there = make_state(SMALL, train_cfg), make_state(SMALL, train_cfg, device)
    assert all(same_bits(there.params[name].cpu(), p) for name, p in here.params.items())
    for k in range(3):
        x, y = random_batch(seed=k)
        here, metrics = train_step(here, (x, y), 0.01)
        there, there_metrics = train_step(there, (x.to(device), y.to(device)), 0.01)
        assert there_metrics["loss"].device.type == device
        torch.testing.assert_close(there_metrics["loss"].cpu(), metrics["loss"])
    on_cpu = {name: t.cpu() for name, t in tensors(there).items()}
    assert_close_trees(on_cpu, tensors(here), rtol=1e-3, atol=1e-3)
    assert evaluate(there, STREAM, 1) == pytest.approx(evaluate(here, STREAM, 1), abs=1e-3)
    assert same_state(from_modules(*to_modules(there), train_cfg), there)


# --- batch and dropout of a step ----------------------------------------------------------------

SOURCES, P = {"wiki": STREAM, "roam": STREAM[::-1]}, {"wiki": 0.5, "roam": 0.5}


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**9))
@settings(max_examples=20)
def test_a_batch_belongs_to_its_seed_and_step(seed, step):
    x, y = batch_of_step(seed, step, SOURCES, p=P, B=4, T=9)
    again = batch_of_step(seed, step, SOURCES, p=P, B=4, T=9)
    generator = keyed_generator(seed, "batch", step)
    by_hand = get_batch(SOURCES, p=P, B=4, T=9, device="cpu", generator=generator)
    for other in (again, by_hand):
        assert torch.equal(x, other[0])
        assert torch.equal(y, other[1])
    assert not torch.equal(x, batch_of_step(seed, step + 1, SOURCES, p=P, B=4, T=9)[0])
    assert not torch.equal(x, batch_of_step(seed ^ 1, step, SOURCES, p=P, B=4, T=9)[0])


def test_dropout_keys_belong_to_seed_step_and_rows():
    keys = dropout_of_step(7, 3, range(5), SMALL)
    assert torch.equal(keys, dropout_keys(7, 3, range(5), sites(SMALL.L)))
    assert torch.equal(dropout_of_step(7, 3, range(2, 5), SMALL), keys[2:])
    assert dropout_of_step(7, 3, range(5), PLAIN) is None


def test_a_step_draws_its_own_dropout():
    """The loss of a step is the loss under the keys of (seed, step) and of no other."""
    state, batch = trained_state(seed=8), random_batch()
    _, expected = gradients(state.params, batch, SMALL, dropout_of_step(8, 3, range(4), SMALL))
    assert same_bits(train_step(state, batch, 0.01)[1]["loss"], expected)
