"""Models trained together: each equals its solo run."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt import ModelConfig, TrainConfig, evaluate, make_state
from niels_gpt.analysis import sweep
from niels_gpt.analysis.replay import differences
from niels_gpt.corpus import Corpus
from tests.training import PLAIN, SMALL, copy_of, same_state

STREAM = bytes((i * i + i // 7) % 256 for i in range(3000))
TEXT = Corpus(
    train={"wiki": STREAM, "roam": STREAM[::-1]},
    val={"wiki": STREAM},
    p={"wiki": 0.7, "roam": 0.3},
    seed=42,
    B=3,
    T=12,
)
CFG = TrainConfig(
    B=3,
    total_steps=12,
    warmup_steps=4,
    base_lr=0.01,
    min_lr=0.001,
    eval_steps=2,
    grad_clip=0.5,
    p_train={"wiki": 0.7, "roam": 0.3},
)
TOLERANCE = 1e-5  # after 12 updates of up to 0.004 each; AdamW magnifies rounding at large rates
GRID = sweep.grid(CFG, [0.001, 0.004], [0.0, 0.3], [42, 43])


def largest_difference(a, b):
    return max((d.size for d in differences(a, b) if d.tensor.startswith("params")), default=0.0)


@pytest.fixture(
    scope="module",
    params=[(PLAIN, "adamw"), (SMALL, "adamw"), (PLAIN, "muon")],
    ids=["plain", "dropout", "muon"],
)
def both(request):
    model_cfg, name = request.param
    cfgs = [replace(cfg, optimizer=name) for cfg in GRID]
    together = sweep.train_together(model_cfg, cfgs, TEXT)
    return together, sweep.train_alone(model_cfg, cfgs, TEXT)


def test_each_model_of_a_sweep_equals_its_solo_run(both):
    for one, other in zip(*both, strict=True):
        assert one.step == other.step == 12
        assert one.train_cfg == other.train_cfg
        assert largest_difference(one, other) < TOLERANCE


def test_what_the_models_are_given_tells_them_apart(both):
    """Each lr, decay and seed gives another result, by far more than rounding."""
    together, _ = both
    for i, one in enumerate(together):
        for other in together[:i]:
            assert largest_difference(one, other) > 10 * TOLERANCE


def test_a_member_is_the_run_that_the_config_describes():
    """A member with the config's seed equals the run made of the public parts."""
    from niels_gpt.lr_schedule import lr_at_step
    from niels_gpt.step import batch_of_step, train_step

    (member,) = sweep.train_alone(SMALL, GRID[5:6], TEXT)
    cfg = replace(CFG, base_lr=0.004, min_lr=0.0004, weight_decay=0.0, seed=43)
    state = make_state(SMALL, cfg)
    for k in range(12):
        batch = batch_of_step(43, k, TEXT.train, p=TEXT.p, B=3, T=12)
        lr = lr_at_step(k, 12, base_lr=0.004, warmup_steps=4, min_lr=0.0004)
        state, _ = train_step(state, batch, lr)
    assert same_state(state, member)


def test_a_model_that_diverges_leaves_the_others_alone():
    cfgs = sweep.grid(CFG, [0.004, 1e20], [0.1], [42])
    together = sweep.train_together(PLAIN, cfgs, TEXT)
    alone = sweep.train_alone(PLAIN, cfgs[:1], TEXT)
    assert largest_difference(together[0], alone[0]) < TOLERANCE
    good, bad = sweep.results(together, STREAM, 42)
    assert good.val_loss == evaluate(together[0], STREAM, 42)
    assert not math.isfinite(bad.val_loss)


def test_stacking_is_lossless_and_changes_nothing():
    states = [make_state(SMALL, cfg) for cfg in GRID[:3]]
    before = [copy_of(state) for state in states]
    stacked = sweep.stack(states)
    kept = copy_of(stacked)
    for a, b in zip(sweep.unstack(stacked, GRID[:3]), states, strict=True):
        assert same_state(a, b)
    sweep.advance_all(stacked, GRID[:3], TEXT)
    assert same_state(stacked, kept)
    for a, b in zip(states, before, strict=True):
        assert same_state(a, b)


# --- the grid ----------------------------------------------------------------------------------

rates = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=3, unique=True)


@given(rates, st.lists(st.floats(0, 1), min_size=1, max_size=2, unique=True), st.integers(1, 3))
def test_the_grid_has_every_combination_once_and_keeps_the_shape_of_the_schedule(lrs, decays, n):
    cfgs = sweep.grid(CFG, lrs, decays, range(n))
    keys = [(cfg.base_lr, cfg.weight_decay, cfg.seed) for cfg in cfgs]
    assert len(set(keys)) == len(keys) == len(lrs) * len(decays) * n
    assert {key[0] for key in keys} == set(lrs)
    for cfg in cfgs:
        assert math.isclose(cfg.min_lr, cfg.base_lr * 0.1)
        changed = {"base_lr": 0.01, "min_lr": 0.001, "weight_decay": 0.1, "seed": 42}
        assert replace(cfg, **changed) == CFG


@given(st.integers(1, 40), st.integers(1, 100), st.integers(1, 1000))
def test_groups_cover_the_models_in_order_and_fit(n, each, budget):
    cfgs = [replace(CFG, seed=i) for i in range(n)]
    parts = sweep.groups(cfgs, each, budget)
    assert [cfg for part in parts for cfg in part] == cfgs
    sizes = [len(part) for part in parts]
    assert all(size == 1 or size * each <= budget for size in sizes)
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes[:2]) * each > budget or len(sizes) == 1  # no fewer groups would do


def test_the_memory_estimate_grows_with_the_model():
    small, large = ModelConfig(T=128, C=128), ModelConfig(T=128, C=256, d_ff=2048)
    assert sweep.member_bytes(small, 16) < sweep.member_bytes(large, 16)
    assert sweep.member_bytes(small, 1) < sweep.member_bytes(small, 8)


# --- what came out -----------------------------------------------------------------------------


def test_cells_are_means_and_deviations_over_seeds():
    found = [sweep.Result(lr, 0.1, seed, 2.0 + lr + seed) for lr in (0.1, 0.2) for seed in (0, 1)]
    found.append(sweep.Result(0.4, 0.1, 0, math.nan))
    low, high, lost = sweep.cells(found)
    assert low == sweep.Cell(0.1, 0.1, pytest.approx(2.6), pytest.approx(0.5**0.5), 2, 0)
    assert high.mean == pytest.approx(2.7)
    assert (lost.mean, lost.diverged, lost.spread) == (math.inf, 1, None)


def cell(lr, mean, spread=None, decay=0.1):
    return sweep.Cell(lr, decay, mean, spread, 1 if spread is None else 2, int(math.isinf(mean)))


def test_the_lowest_mean_is_suggested_and_the_edge_is_noted():
    inside = sweep.suggest([cell(1, 2.0), cell(2, 1.0), cell(3, 3.0)])
    assert inside == sweep.Suggestion(cell(2, 1.0), [])
    upper = sweep.suggest([cell(1, 2.0), cell(2, 1.0)])
    assert "best lr lies at the upper end" in upper.messages[0]
    lower = sweep.suggest([cell(1, 0.5), cell(2, 1.0), cell(3, math.inf)])
    assert "best lr lies at the lower end" in lower.messages[0]
    assert sweep.suggest([cell(1, 1.0)]).messages == []
    decay = sweep.suggest([cell(1, 1.0, decay=0.1), cell(1, 2.0, decay=0.2)])
    assert "best weight decay lies at the lower end" in decay.messages[0]
    assert sweep.suggest([cell(1, math.inf)]) is None


def test_what_the_seeds_cannot_tell_apart_is_said():
    close = sweep.suggest([cell(1, 1.2, 0.3), cell(2, 1.0, 0.1), cell(3, 2.0, 0.1)])
    assert close.messages == ["lr 1 with weight decay 0.1 is as good within the seed spread"]


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def run(niels, texts, tmp_path):
    config = tmp_path / "config.json"
    model = {"T": 12, "C": 8, "L": 1, "H": 2, "d_ff": 8}
    config.write_text(json.dumps({"model": model, "train": {"B": 2, "total_steps": 4}}))
    where = ["--wiki", texts / "wiki", "--roam", texts / "notes", "--set", "train.eval_steps=1"]
    return lambda *args: niels("sweep", "--config", config, *where, *args)


def test_the_command_prints_a_row_for_each_rate_and_a_suggestion(run):
    result = run("--lr", "1e-3,1e-2", "--seeds", 2, "--memory", "1e-9", "--together")
    assert result.exit_code == 0, result.output
    assert "4 models in 4 groups" in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["weight", "decay", "lr", "val", "nats", "spread", "seeds"]
    assert [line.split()[:2] for line in lines[1:3]] == [["0.1", "0.001"], ["0.1", "0.01"]]
    assert lines[3].startswith("suggested: lr ")


def test_the_picture_names_the_shares_that_were_trained_on(run, monkeypatch):
    from niels_gpt.analysis import plot

    titles = []
    monkeypatch.setattr(sweep, "draw", lambda found, title: titles.append(title))
    monkeypatch.setattr(plot, "check_pictures", lambda paths: None)
    monkeypatch.setattr(plot, "save_figure", lambda figure, paths: figure())
    result = run("--lr", "1e-3", "--mix", "wiki=0.1,roam=0.9", "--picture", "a.svg")
    assert result.exit_code == 0, result.output
    assert "roam 90%, wiki 10%" in " ".join(titles[0])


@pytest.mark.parametrize("memory", ["inf", "nan", "-1"])
def test_a_memory_that_is_no_number_of_bytes_is_refused(run, memory):
    result = run("--lr", "1e-3", "--memory", memory)
    assert result.exit_code == 2
    assert "Invalid value for '--memory'" in result.stderr


def test_solo_and_together_agree(run):
    found = []
    for way in (["--together"], ["--solo"]):
        result = run("--lr", "1e-3,1e-2", "--json", *way)
        assert result.exit_code == 0, result.output
        found.append([r["val_loss"] for r in json.loads(result.stdout)["results"]])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.parametrize(
    ("alone", "shown", "other"),
    [(0.4, "2 models one by one", "train_together"), (0.6, "2 models in 1 group", "train_alone")],
)
def test_what_is_faster_is_done(run, monkeypatch, alone, shown, other):
    seconds = iter([1.0, alone])  # of a step of both models, and of one
    monkeypatch.setattr(sweep, "_seconds", lambda action: next(seconds))
    monkeypatch.delattr(sweep, other)
    result = run("--lr", "1e-3,1e-2")
    assert result.exit_code == 0, result.output
    assert shown in result.stderr


def test_a_dry_run_only_estimates(run):
    result = run("--lr", "1e-3,1e-2,1e-1", "--dry-run", "--together")
    assert result.exit_code == 0
    assert "3 models in 1 group: about" in result.stdout
    assert len(result.stdout.splitlines()) == 1
    cost = json.loads(run("--lr", "1e-3,1e-2", "--dry-run", "--json").stdout)["cost"]
    assert (cost["models"], cost["groups"]) == (2, 1)


def test_a_model_that_does_not_fit_is_said_to_be_too_large(run):
    result = run("--lr", "1e-3", "--memory", "1e-9", "--dry-run", "--together")
    assert "one model alone takes about" in result.stderr
    assert "1 model in 1 group: about" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lr", "fast"], "not a list of numbers"),
        (["--lr", "1e-3", "--seeds", 10**20], "a sweep has at most 10,000 models"),
        (["--lr", "1e-3,1e-2", "--seeds", 5001], "a sweep has at most 10,000 models"),
        (["--lr", "0,1e-3"], "lr=0 must be above 0"),
        (["--lr", "1e-3,0.001"], "repeats a number"),
        (["--lr", "1e-3", "--picture", "lost/sweep.png"], "folder not found: lost"),
        (["--lr", "-1"], "base_lr=-1.0 must be a number"),
        (["--lr", "1e-3", "--picture", "sweep.gif"], "picture must be .png or .svg"),
        (["--lr", "1e-3", "--set", "train.B=0"], "train.B=0"),
    ],
)
def test_mistakes_end_with_code_2_and_one_message(run, args, message):
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_picture_has_each_seed_each_mean_and_the_suggestion(tmp_path):
    pytest.importorskip("matplotlib")
    from niels_gpt.analysis import plot

    def result(lr, nats, seed=1, decay=0.1):
        return sweep.Result(lr, decay, seed, nats)

    found = [
        *(result(1e-3, 2.0), result(1e-3, 2.4, 2), result(1e-2, 1.5), result(1e-2, 1.7, 2)),
        *(result(1e-1, 3.0), result(1e-1, math.nan, 2), result(1e-3, 1.9, decay=0.0)),
    ]
    axes = sweep.draw(found, ["a sweep", "of models"]).axes[0]
    drawn = [(line.get_xdata(), line.get_ydata()) for line in axes.lines]
    assert [(list(x), list(y)) for x, y in drawn] == [
        ([1e-3], [1.9]),  # a dot for each seed, and a line through the means
        ([1e-3], [1.9]),
        ([1e-3, 1e-3, 1e-2, 1e-2, 1e-1], [2.0, 2.4, 1.5, 1.7, 3.0]),
        ([1e-3, 1e-2], [2.2, 1.6]),
        ([1e-2], [1.6]),  # the ring of the suggestion
        ([1e-1], [0.97]),  # the cross
    ]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    expected = ["weight decay 0", "weight decay 0.1", "suggested: lr 0.01, 1.600 nats", "diverged"]
    assert labels == expected
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.001", "0.01", "0.1"]
    lost = sweep.draw([result(1e-1, math.inf), result(1.0, math.inf)]).axes[0]
    assert [text.get_text() for text in lost.get_legend().get_texts()] == ["diverged"]
    assert axes.get_xscale() == "log"
    plot.save_figure(lambda: sweep.draw(found), [tmp_path / "sweep.png"])
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    assert torch.is_grad_enabled()
