"""The loop: order of duties, resume, guards. The ports are in memory, the step is the real one."""

import contextlib
import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from niels_gpt import ModelConfig, TrainConfig, evaluate, make_state, train_step
from niels_gpt.config import OPTIMIZERS
from niels_gpt.lr_schedule import lr_at_step
from niels_gpt.run.loop import NonFiniteError, Ports, Scores, evaluation_due, run
from niels_gpt.run.stop import Stopped
from niels_gpt.step import batch_of_step
from tests.training import same_state

MODEL = ModelConfig(T=8, C=8, L=1, H=2, d_ff=8, dropout=0.2)
TEXT = {"wiki": bytes(range(256)) * 2}


def config(**changes):
    small = TrainConfig(B=2, total_steps=7, eval_every=3, eval_steps=2, log_every=2, ckpt_every=4)
    return dataclasses.replace(small, warmup_steps=2, base_lr=0.01, min_lr=0.001, **changes)


class World:
    """Ports that record what happens and keep every save."""

    def __init__(self, cfg, *, stop_at=None, fail_saves=(), stop_in_evaluation=False):
        self.cfg, self.stop_at, self.events, self.files = cfg, stop_at, [], {}
        self.fail_saves, self.stop_in_evaluation = list(fail_saves), stop_in_evaluation
        self.done = 0

    def ports(self, **changes):
        cfg = self.cfg
        ports = Ports(
            batch=lambda k: batch_of_step(cfg.seed, k, TEXT, p={"wiki": 1.0}, B=cfg.B, T=MODEL.T),
            lr=lambda k: lr_at_step(
                k,
                cfg.total_steps,
                base_lr=cfg.base_lr,
                warmup_steps=cfg.warmup_steps,
                min_lr=cfg.min_lr,
            ),
            step=train_step,
            evaluate=self.evaluate,
            on_step=lambda step, lr, metrics: setattr(self, "done", step),
            on_log=lambda step, lr, values: self.events.append(("log", step, lr, values)),
            on_eval=lambda step, scores: self.events.append(("eval", step, scores.val_loss)),
            save=self.save,
            check_stop=self.check_stop,
            may_stop=contextlib.nullcontext,
            check_each=True,
        )
        return dataclasses.replace(ports, **changes)

    def evaluate(self, state):
        if self.stop_in_evaluation:
            raise Stopped(15)
        return evaluate(state, TEXT["wiki"], self.cfg.seed)

    def save(self, names, state, scores):
        if self.fail_saves and self.fail_saves.pop(0):
            self.events.append(("failed", state.step))
            return False
        for name in names:
            self.events.append(("save", state.step, name))
            self.files[name] = (state, scores)
        return True

    def check_stop(self):
        if self.stop_at is not None and self.done >= self.stop_at:
            raise Stopped(15)


def brief(events):
    return [event[:3] if event[0] == "save" else event[:2] for event in events]


def test_duties_come_in_the_order_of_the_contract():
    world, losses = World(config(ckpt_every=3)), iter([3.0, 4.0, 2.0])
    ports = world.ports(evaluate=lambda state: next(losses))
    _, _, saved = run(make_state(MODEL, world.cfg), Scores(), ports)
    assert saved
    assert brief(world.events) == [
        ("log", 1),
        ("log", 2),
        ("save", 3, "latest.pt"),
        ("eval", 3),
        ("save", 3, "best.pt"),
        ("save", 3, "step_0000003.pt"),
        ("save", 3, "latest.pt"),
        ("log", 4),
        ("log", 6),
        ("save", 6, "latest.pt"),
        ("eval", 6),
        ("save", 6, "step_0000006.pt"),
        ("save", 6, "latest.pt"),
        ("log", 7),
        ("save", 7, "latest.pt"),
        ("eval", 7),
        ("save", 7, "best.pt"),
        ("save", 7, "latest.pt"),
    ]


def test_best_is_the_lowest_validation_loss_and_never_older_than_latest_knows():
    world = World(config(total_steps=6, eval_every=1))
    losses = iter([3.0, 2.0, 2.5, 2.0, 1.0, 4.0])
    run(make_state(MODEL, world.cfg), Scores(), world.ports(evaluate=lambda state: next(losses)))
    bests = [event[1] for event in world.events if event[0] == "save" and event[2] == "best.pt"]
    assert bests == [1, 2, 5]
    assert world.files["latest.pt"][1] == Scores(1.0, 5, 4.0, 6)


@settings(max_examples=15)  # whole runs
@given(
    cut=st.integers(1, 6),
    every=st.integers(1, 4),
    ckpt=st.integers(1, 4),
    optimizer=st.sampled_from(OPTIMIZERS),
)
def test_a_stopped_run_resumed_ends_like_one_that_was_not(cut, every, ckpt, optimizer):
    cfg = config(eval_every=every, ckpt_every=ckpt, optimizer=optimizer)
    whole = World(cfg)
    run(make_state(MODEL, cfg), Scores(), whole.ports())

    first = World(cfg, stop_at=cut)
    with pytest.raises(Stopped):
        run(make_state(MODEL, cfg), Scores(), first.ports())
    state, scores = first.files["latest.pt"]
    assert state.step == cut
    second = World(cfg)
    second.files = dict(first.files)
    run(state, scores, second.ports())

    assert {*second.files} == {*whole.files}
    for name, (state, scores) in whole.files.items():
        assert same_state(second.files[name][0], state)
        assert second.files[name][1] == scores
    told = [e for e in first.events + second.events if e[0] in ("log", "eval")]
    assert json.dumps(told) == json.dumps([e for e in whole.events if e[0] in ("log", "eval")])


def test_a_run_stopped_in_an_evaluation_has_saved_its_state_and_makes_the_evaluation_up():
    cfg = config()
    first = World(cfg, stop_in_evaluation=True)
    with pytest.raises(Stopped):
        run(make_state(MODEL, cfg), Scores(), first.ports())
    state, scores = first.files["latest.pt"]
    assert (state.step, scores.val_step) == (3, None)
    second = World(cfg)
    run(state, scores, second.ports())
    assert brief(second.events)[0] == ("eval", 3)


def test_a_resume_at_the_end_saves_and_does_nothing_else_twice():
    cfg = config()
    first = World(cfg)
    run(make_state(MODEL, cfg), Scores(), first.ports())
    second = World(cfg)
    _, _, saved = run(*first.files["latest.pt"], second.ports())
    assert saved
    assert brief(second.events) == [("save", 7, "latest.pt")]


@pytest.mark.parametrize("fail_saves", [[], [True]])
def test_a_resume_that_is_stopped_before_its_first_save_saves(fail_saves):
    cfg = config()
    first = World(cfg, stop_at=4)
    with pytest.raises(Stopped):
        run(make_state(MODEL, cfg), Scores(), first.ports())
    second = World(cfg, stop_at=0, fail_saves=fail_saves)
    with pytest.raises(Stopped):
        run(*first.files["latest.pt"], second.ports())
    expected = [("failed", 4)] if fail_saves else [("save", 4, "latest.pt")]
    assert brief(second.events) == expected


def test_an_evaluation_on_another_text_is_made_again():
    cfg = config()
    first = World(cfg)
    run(make_state(MODEL, cfg), Scores(), first.ports())
    state, scores = first.files["latest.pt"]
    second = World(cfg)
    run(state, Scores(val_step=scores.val_step), second.ports())
    assert brief(second.events) == [("eval", 7), ("save", 7, "best.pt"), ("save", 7, "latest.pt")]


def test_a_stop_before_the_first_step_saves_the_initial_state():
    world = World(config(), stop_at=0)
    with pytest.raises(Stopped):
        run(make_state(MODEL, world.cfg), Scores(), world.ports())
    assert brief(world.events) == [("save", 0, "latest.pt")]


def test_a_stop_after_a_failed_save_tries_again():
    world = World(config(), stop_at=4, fail_saves=[False, False, True])
    with pytest.raises(Stopped):
        run(make_state(MODEL, world.cfg), Scores(), world.ports())
    assert brief(world.events)[-2:] == [("failed", 4), ("save", 4, "latest.pt")]


def test_training_goes_on_after_a_failed_save_and_a_failed_final_save_is_told():
    world = World(config(), fail_saves=[True] * 100)
    state, _, saved = run(make_state(MODEL, world.cfg), Scores(), world.ports())
    assert state.step == 7
    assert not saved


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_non_finite_step_is_not_adopted(name):
    def poisoned(state, batch, lr):
        new_state, metrics = train_step(state, batch, lr)
        if state.step == 4:
            metrics[name] = torch.tensor(float("nan"))
        return new_state, metrics

    world = World(config())
    with pytest.raises(NonFiniteError, match=f"{name} of step 5 is nan"):
        run(make_state(MODEL, world.cfg), Scores(), world.ports(step=poisoned))
    assert world.done == 4


@pytest.mark.parametrize("check_each", [True, False])
def test_nothing_non_finite_is_ever_logged_evaluated_or_saved(check_each):
    def poisoned(state, batch, lr):
        new_state, metrics = train_step(state, batch, lr)
        return new_state, {**metrics, "loss": metrics["loss"] * float("inf")}

    world = World(config(log_every=1000))
    with pytest.raises(NonFiniteError):
        run(
            make_state(MODEL, world.cfg),
            Scores(),
            world.ports(step=poisoned, check_each=check_each),
        )
    assert world.events == []


def test_a_validation_loss_that_is_not_finite_never_becomes_the_best():
    world = World(config())
    with pytest.raises(NonFiniteError, match="validation loss after step 3"):
        run(
            make_state(MODEL, world.cfg),
            Scores(),
            world.ports(evaluate=lambda state: float("nan")),
        )
    assert "best.pt" not in world.files


@settings(max_examples=15)
@given(every=st.integers(1, 8), log=st.integers(1, 8), ckpt=st.integers(1, 8))
def test_the_cadence_of_looking_leaves_the_training_alone(every, log, ckpt):
    plain, other = World(config()), World(config(eval_every=every, log_every=log, ckpt_every=ckpt))
    a, _, _ = run(make_state(MODEL, plain.cfg), Scores(), plain.ports())
    b, _, _ = run(make_state(MODEL, other.cfg), Scores(), other.ports())
    assert same_state(a, b._replace(train_cfg=a.train_cfg))


@given(step=st.integers(1, 50), total=st.integers(1, 50), every=st.integers(1, 50))
def test_evaluations_are_due_every_so_often_and_at_the_end(step, total, every):
    cfg = config(total_steps=total, eval_every=every)
    state = make_state(MODEL, cfg)._replace(step=step)
    assert evaluation_due(state) == (step % every == 0 or step == total)
