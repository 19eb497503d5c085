"""The reference is fair only if it computes what the trainer computes."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from benchmarks import optimizer as optimizer_cost
from benchmarks import profile, sweep
from benchmarks.imperative import ImperativeGPT, imperative_step, make_optimizer
from benchmarks.learning_curve import learning_curve, validation_loss
from benchmarks.rows import Figure, by_checkout
from benchmarks.sides import side_of
from benchmarks.timing import median_seconds
from niels_gpt import evaluate, make_state, train_step
from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.corpus import Corpus
from niels_gpt.loss import forward
from niels_gpt.lr_schedule import lr_of_step
from niels_gpt.paths import REPO_ROOT
from niels_gpt.state import TrainState

MODEL = ModelConfig(T=80, C=16, L=2, H=2, d_ff=24, dropout=0.0)
TRAIN = TrainConfig(B=3, eval_steps=2, eval_every=2, total_steps=6, warmup_steps=2)
TEXT = random.Random(7).randbytes(2_000)


def state_and_twin(
    model_cfg: ModelConfig = MODEL,
) -> tuple[TrainState, ImperativeGPT, torch.optim.Optimizer]:
    state = make_state(model_cfg, TRAIN)
    twin = ImperativeGPT(model_cfg)
    twin.load_state_dict({**state.params, "lm_head.weight": state.params["tok_emb.weight"]})
    return state, twin, make_optimizer(twin, TRAIN)


def random_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.randint(256, (2, 3, 80), generator=torch.Generator().manual_seed(seed))
    return x, y


def test_both_models_compute_the_same_logits():
    state, twin, _ = state_and_twin()
    x, _ = random_batch(1)
    assert_close(forward(state.params, x, MODEL), twin(x), rtol=1e-5, atol=1e-6)


def test_both_steps_follow_the_same_trajectory():
    state, twin, optimizer = state_and_twin()
    for k in range(5):
        batch, lr = random_batch(k), 1e-3 * k
        state, metrics = train_step(state, batch, lr)
        loss = imperative_step(twin, optimizer, *batch, lr=lr, grad_clip=TRAIN.grad_clip)
        assert_close(metrics["loss"], loss, rtol=1e-5, atol=1e-6)
    for name, p in twin.named_parameters():
        assert_close(state.params[name], p.detach(), rtol=1e-4, atol=1e-6)


def test_both_evaluations_give_the_same_loss():
    state, twin, _ = state_and_twin()
    ours = evaluate(state, TEXT, TRAIN.seed)
    assert validation_loss(twin, TEXT, TRAIN, T=MODEL.T) == pytest.approx(ours, rel=1e-5)


def test_dropout_of_the_yardstick_acts_in_training_only():
    _, twin, _ = state_and_twin(ModelConfig(T=80, C=16, L=2, H=2, d_ff=24, dropout=0.5))
    x, _ = random_batch(1)
    assert not torch.equal(twin(x), twin(x))
    twin.eval()
    assert torch.equal(twin(x), twin(x))


def test_learning_curve_reports_each_evaluation_and_the_last_step():
    cfg = replace(TRAIN, lr_decay="linear", total_steps=5, warmup_steps=0, min_lr=0.0)
    text = {"wiki": TEXT}  # the other sources of the config are not there
    corpus = Corpus(text, text, {"wiki": 1.0}, cfg.seed, cfg.B, MODEL.T)
    records = list(learning_curve(MODEL, cfg, corpus, steps=5))
    assert [r["step"] for r in records] == [2, 4, 5]
    assert [r["lr"] for r in records] == [lr_of_step(r["step"] - 1, cfg) for r in records]
    assert all(4.0 < r["val_wiki_loss"] < 7.0 for r in records)


def test_sides_are_timed_in_turn_after_the_warm_up():
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = median_seconds(sides, rounds=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert seconds.keys() == {"a", "b"}


def test_a_side_of_a_checkout_uses_the_package_there(tmp_path):
    package = tmp_path / "niels_gpt"
    package.mkdir()
    with side_of(REPO_ROOT, "niels_gpt", MODEL, TRAIN) as step:
        step()
    (package / "__init__.py").write_text("raise SystemExit\n")
    with pytest.raises(RuntimeError, match="ended"), side_of(tmp_path, "niels_gpt", MODEL, TRAIN):
        pass


@pytest.mark.parametrize(
    ("value", "at_least", "met"), [(2.0, True, True), (0.5, True, False), (2.0, False, False)]
)
def test_a_bar_is_a_lower_or_an_upper_limit(value, at_least, met):
    assert Figure("x", value, bar=1.0, at_least=at_least, detail={}).met is met


def test_another_checkout_takes_the_place_of_ours_beside_the_plain_loop():
    seconds = {"sgemm": 1.0, "plain": 2.0, "ours": 3.0, "before: ours": 4.0}
    assert list(by_checkout(seconds)) == [
        ("", {"sgemm": 1.0, "plain": 2.0, "ours": 3.0}),
        (", before", {"sgemm": 1.0, "plain": 2.0, "ours": 4.0}),
    ]


@pytest.mark.parametrize(
    ("operation", "group"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::gelu_backward", "GELU and its gradient"),
        ("aten::copy_", "copies, concatenation"),
        ("aten::view", profile.REST),
    ],
)
def test_an_operation_of_the_profile_has_its_group(operation, group):
    assert profile.group_of(operation) == group


def test_the_shares_of_a_profile_are_all_of_the_time():
    a = torch.ones(64, 64)
    found = profile.shares(lambda: torch.mm(a, a), rounds=2)
    assert sum(found.values()) == pytest.approx(1)
    assert found["matrix products"] > 0


def test_the_table_of_a_sweep_has_a_row_for_each_width():
    ratios = {(C, M): C / M for C in sweep.WIDTHS for M in sweep.MEMBERS}
    lines = sweep.table(ratios)
    assert lines[0] == "| C | 2 models | 4 models | 8 models |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 32", "| 64", "| 128", "| 256"]
    assert lines[2] == "| 32 | 16.00 | 8.00 | 4.00 |"


def test_the_operations_of_an_update_are_those_of_muons_products():
    cfg, cube = ModelConfig(T=8, C=16, L=1, H=2, d_ff=64), 16**3
    square = 4 * 4 * 6 * cube  # q, k, v and proj: four times X X^T, A^2 and the product with X
    wide = 2 * (2 * 8 + 2 * (1 + 3 * 4)) * cube  # fc1 and fc2: X X^T, Q X, the rest on 16 x 16
    assert optimizer_cost.update_flops(cfg, "muon") == square + wide
    assert optimizer_cost.update_flops(cfg, "adamw") == 0


def test_both_sides_of_the_sweep_are_timed():
    together, alone = sweep.times(8, 2, 0.1, rounds=1, clock=time.perf_counter)
    assert together > 0
    assert alone > 0
