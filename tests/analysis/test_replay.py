"""Repeated steps: equal bits, the place of a bit that differs, and the inside of a step."""

import json
import math
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from click.testing import CliRunner

from niels_gpt import ModelConfig, TrainConfig, make_state, save_state, train_step
from niels_gpt.analysis import replay
from niels_gpt.checkpoint import checkpoint_of, load_checkpoint, open_checkpoint, write_checkpoint
from niels_gpt.cli import main
from niels_gpt.config import OPTIMIZERS
from niels_gpt.corpus import advance, next_batch, open_corpus
from niels_gpt.data.sources import Given
from niels_gpt.loss import gradients
from niels_gpt.optim.clip import clip_by_global_norm
from niels_gpt.optim.trees import global_norm, map_tensors
from niels_gpt.run.metrics import read_metrics, to_lines
from niels_gpt.run.plan import environment_changes
from niels_gpt.schema import write_payload
from niels_gpt.state import empty_model
from niels_gpt.step import dropout_of_step
from niels_gpt.streams import locate
from tests import ROOT
from tests.training import SMALL, same_state, trained_state

CONFIG = {
    "model": {"T": 12, "C": 8, "L": 2, "H": 2, "d_ff": 8, "dropout": 0.1},
    "train": {
        "B": 4,
        "total_steps": 10,
        "eval_every": 5,
        "eval_steps": 1,
        "ckpt_every": 3,
        "log_every": 2,
        "warmup_steps": 2,
        "base_lr": 0.01,
    },
}


@pytest.fixture(scope="module")
def run_under(tmp_path_factory, texts):
    """Return the output folder of a run under an optimizer."""

    @cache
    def run(optimizer):
        root = tmp_path_factory.mktemp("run")
        (root / "config.json").write_text(json.dumps(CONFIG))
        args = ["--config", root / "config.json", "--out", root / "out", "--device", "cpu"]
        args += ["--wiki", texts / "wiki", "--roam", texts / "notes"]
        args += ["--set", f"train.optimizer={optimizer}"]
        result = CliRunner().invoke(main, ["train", *map(str, args)])
        assert result.exit_code == 0, result.output
        return root / "out"

    return run


@pytest.fixture(scope="module")
def whole_run(run_under):
    return run_under("adamw")


@pytest.fixture
def run(whole_run, tmp_path):
    """A copy of the output folder of a run, to damage."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for file in whole_run.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def again(niels, texts):
    """Run `niels-gpt replay` on the text of the run."""
    where = ["--wiki", texts / "wiki", "--roam", texts / "notes"]
    return lambda *args: niels("replay", *where, *args)


def change(path, edit):
    """Write a good checkpoint whose content differs from what the run saved."""
    payload = load_checkpoint(path, device="cpu")
    edit(payload)
    write_payload([path], payload)


def flip_lowest_bit(name, place, kind="model_state"):
    def edit(payload):
        if kind == "model_state":
            tensor = payload[kind][name]
        else:
            names = [n for n in payload["model_state"] if n != "lm_head.weight"]
            tensor = payload["optimizer_state"]["state"][names.index(name)][kind]
        tensor.view(torch.int32)[place] ^= 1

    return edit


# --- a stretch of a run ------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_taken_again_is_identical_from_every_start(run_under, again, optimizer):
    run = run_under(optimizer)
    for start in (["--from", run / "step_0000003.pt"], ["--from", run / "best.pt"], []):
        result = again(*start, "--to", run / "latest.pt")
        assert result.exit_code == 0, result.output
        assert result.stdout == "identical: every bit of latest.pt\n"


def test_one_flipped_bit_is_caught_and_located(run, again):
    name, place = "blocks.1.mlp.fc1.weight", (3, 5)
    change(run / "step_0000009.pt", flip_lowest_bit(name, place))
    result = again("--from", run / "step_0000003.pt", "--to", run / "step_0000009.pt", "--json")
    assert result.exit_code == 1, result.output
    verdict = json.loads(result.stdout)
    (found,) = verdict["differences"]
    assert (found["tensor"], found["elements"], found["place"]) == (f"params {name}", 1, [3, 5])
    assert found["size"] == abs(found["here"] - found["there"]) > 0
    assert found["size"] < 1e-7
    # The loss of step 8 was met, so the state after 7 was; the bit is that of the state after 9.
    assert (verdict["same"], verdict["agreed"], verdict["differs"]) == (6, 7, 9)
    lines = again("--from", run / "step_0000003.pt", "--to", run / "step_0000009.pt").stdout
    assert f"first seen at step 9, in params {name}" in lines
    assert "every bit is the same after step 6\n" in lines
    assert "so is the loss of the state after step 7: " in lines


@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq"])
def test_moments_are_compared_too(run, again, kind):
    change(run / "step_0000009.pt", flip_lowest_bit("ln_f.bias", (2,), kind))
    result = again("--from", run / "step_0000006.pt", "--to", run / "step_0000009.pt")
    assert result.exit_code == 1
    assert f"in {kind} ln_f.bias" in result.stdout.splitlines()[0]


def test_a_change_on_the_way_is_bracketed_by_saved_states_and_logged_losses(run, again, opened):
    """A run that changes after step 6: all later files and metrics follow from the change."""
    state, corpus = opened
    corpus = replace(corpus, train={name: s[::-1] for name, s in corpus.train.items()})
    records = [r for r in read_metrics(run / "metrics.jsonl") if r["step"] <= 6]
    while state.step < 9:
        state, metrics = advance(state, corpus)
        values = {name: value.item() for name, value in metrics.items()}
        if state.step % 2 == 0:
            records.append({"kind": "train", "step": state.step, **values})
    (run / "metrics.jsonl").write_bytes(to_lines(records))
    write_checkpoint([run / "step_0000009.pt"], checkpoint_of(state))
    result = again("--from", run / "step_0000003.pt", "--to", run / "step_0000009.pt", "--json")
    verdict = json.loads(result.stdout)
    found = [verdict[n] for n in ("identical", "same", "agreed", "differs")]
    assert found == [False, 6, 6, 7]


def test_a_change_too_small_for_the_next_loss_is_not_said_to_come_after_it(run, again, opened):
    """A bit of a moment is changed after step 6: the loss of step 7 knows nothing of it."""
    state, corpus = opened
    records = [r for r in read_metrics(run / "metrics.jsonl") if r["step"] <= 6]
    state = map_tensors(torch.clone, state)
    state.opt_state.exp_avg_sq["ln_f.bias"].view(torch.int32)[2] ^= 1 << 22
    while state.step < 9:
        state, metrics = advance(state, corpus)
        values = {name: value.item() for name, value in metrics.items()}
        records.append({"kind": "train", "step": state.step, **values})
    (run / "metrics.jsonl").write_bytes(to_lines(records))
    (run / "step_0000006.pt").unlink()
    write_checkpoint([run / "step_0000009.pt"], checkpoint_of(state))
    result = again("--from", run / "step_0000003.pt", "--to", run / "step_0000009.pt", "--json")
    verdict = json.loads(result.stdout)
    assert verdict["same"] == 3  # and not the 6 whose loss is met
    assert verdict["agreed"] >= 6
    assert verdict["differs"] > verdict["agreed"]


def test_a_gradient_norm_alone_that_differs_leaves_the_state_before_it_agreed(run, again):
    records = read_metrics(run / "metrics.jsonl")
    wrong = [{**r, "grad_norm": 1.0} if r["step"] == 8 and "loss" in r else r for r in records]
    (run / "metrics.jsonl").write_bytes(to_lines(wrong))
    change(run / "step_0000009.pt", flip_lowest_bit("ln_f.bias", (2,)))
    result = again("--from", run / "step_0000006.pt", "--to", run / "step_0000009.pt", "--json")
    verdict = json.loads(result.stdout)
    assert (verdict["agreed"], verdict["differs"]) == (7, 8)


def test_the_search_ends_at_the_first_saved_state_that_is_not_met(run, again):
    change(run / "step_0000006.pt", flip_lowest_bit("ln_f.weight", (0,)))
    result = again("--to", run / "latest.pt")
    assert result.exit_code == 1
    assert "first seen at step 6" in result.stdout
    assert "every bit is the same after step 3" in result.stdout


def test_files_of_another_config_or_damaged_ones_are_no_witnesses(run, again):
    change(run / "step_0000006.pt", lambda payload: payload["train_cfg"].update(B=5))
    (run / "step_0000003.pt").write_bytes(b"nothing")
    result = again("--to", run / "latest.pt")
    assert result.exit_code == 0, result.output
    assert "step_0000006.pt was skipped: it has another config" in result.stderr
    assert "step_0000003.pt was skipped" in result.stderr


def test_a_log_of_another_run_does_not_decide(run, again):
    records = read_metrics(run / "metrics.jsonl")
    (run / "metrics.jsonl").write_bytes(to_lines({**r, "loss": 1.0} for r in records))
    result = again("--to", run / "latest.pt")
    assert result.exit_code == 0
    assert "metrics.jsonl does not match" in result.stderr


def test_other_text_is_refused_before_the_first_step(run, niels, texts):
    (run / "other").mkdir()
    (run / "other" / "note.md").write_text("Another note.\n" * 99)
    result = niels("replay", "--roam", run / "other", "--to", run / "latest.pt")
    assert result.exit_code == 2
    assert "train/roam" in result.stderr
    assert "now notes, " in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--to PATH or --step N"),
        (["--to", "latest.pt", "--step", "3"], "--to PATH or --step N"),
        (["--to", "nowhere.pt"], "nowhere.pt"),
        (["--from", "latest.pt", "--to", "step_0000003.pt"], "step 10, not before 3"),
        (["--from", ".", "--step", "11"], "steps 1 to 10"),
        (["--from", "step_0000006.pt", "--step", "6"], "after step 6, too late"),
        (["--from", "earlier", "--step", "6"], "no checkpoint in this folder"),
    ],
)
def test_mistakes_end_with_code_2_and_one_message(run, again, monkeypatch, args, message):
    monkeypatch.chdir(run)
    (run / "earlier").mkdir()
    result = again(*args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_differences_tell_zeros_of_either_sign_and_what_is_not_a_number():
    state = trained_state(steps=1)
    assert replay.differences(state, state) == []
    bias = torch.zeros_like(state.params["ln_f.bias"])
    here = state._replace(params={**state.params, "ln_f.bias": bias})
    minus, nan = bias.clone(), bias.clone()
    minus[3], nan[4] = -0.0, math.nan
    (zero,) = replay.differences(here, here._replace(params={**here.params, "ln_f.bias": minus}))
    assert (zero.place, zero.size, zero.elements) == ((3,), 0.0, 1)
    (odd,) = replay.differences(here, here._replace(params={**here.params, "ln_f.bias": nan}))
    assert (odd.place, odd.size) == ((4,), math.inf)
    endless = bias.clone()
    endless[5] = math.inf
    (far,) = replay.differences(here, here._replace(params={**here.params, "ln_f.bias": endless}))
    assert (far.place, far.size) == ((5,), math.inf)


# --- one step ----------------------------------------------------------------------------------


def test_the_step_shown_is_the_one_that_was_logged(run, again, texts):
    (record,) = [r for r in read_metrics(run / "metrics.jsonl") if r["step"] == 8 and "loss" in r]
    result = again("--from", run, "--step", 8, "--json")
    assert result.exit_code == 0, result.output
    assert "reached from step_0000006.pt" in result.stderr
    view = json.loads(result.stdout)
    assert [view[n] for n in ("step", "loss", "grad_norm", "lr")] == [
        record[n] for n in ("step", "loss", "grad_norm", "lr")
    ]


def test_the_checkpoint_after_a_step_is_not_where_it_begins(run, again):
    result = again("--from", run, "--step", 6)
    assert "step 6 was reached from step_0000003.pt" in result.stderr


def test_a_step_before_the_first_checkpoint_is_reached_from_the_initial_state(run, again):
    result = again("--from", run, "--step", 2)
    assert result.exit_code == 0, result.output
    assert "reached from the initial state" in result.stderr
    assert result.stdout.startswith("step 2: loss 5.")


def test_a_step_of_an_extended_run_is_shown_under_the_later_config(run, again, niels, texts):
    """The checkpoint before it was written under the config that ended at step 10."""
    where = ["--wiki", texts / "wiki", "--roam", texts / "notes", "--device", "cpu"]
    config = ["--config", run.parent / "c.json", "--set", "train.total_steps=14"]
    (run.parent / "c.json").write_text(json.dumps(CONFIG))
    longer = niels(
        "train", *config, "--set", "train.log_every=1", "--resume", run / "latest.pt", *where
    )
    assert longer.exit_code == 0, longer.output
    for path in run.glob("step_000001*.pt"):
        path.unlink()  # the last one is of step 9
    (record,) = [r for r in read_metrics(run / "metrics.jsonl") if r["step"] == 13 and "loss" in r]
    result = again("--from", run, "--step", 13, "--json")
    assert result.exit_code == 0, result.output
    assert "the config changed after step_0000009.pt: using that of" in result.stderr
    view = json.loads(result.stdout)
    assert view["lr"] == record["lr"]
    early = again("--from", run, "--step", 8, "--json")
    assert "the config changed" not in early.stderr


@pytest.fixture(scope="module")
def opened(whole_run, texts):
    state = open_checkpoint(whole_run / "step_0000006.pt").state
    return state, open_corpus(
        *state[-2:], locate(Given({"wiki": texts / "wiki", "roam": texts / "notes"}))
    )


def test_advance_is_the_step_of_the_training_loop(whole_run, opened):
    state, corpus = opened
    for _ in range(3):
        state, _ = advance(state, corpus)
    assert same_state(state, open_checkpoint(whole_run / "step_0000009.pt").state)


def test_rows_are_the_windows_of_the_batch_and_their_losses_average_to_the_loss(opened):
    state, corpus = opened
    view = replay.view_step(state, corpus)
    assert math.isclose(sum(row.loss for row in view.rows) / 4, view.loss, rel_tol=1e-6)
    x, _ = next_batch(state, corpus)
    for row, ids in zip(view.rows, x, strict=True):
        window = corpus.train[row.source][row.start : row.start + 13]
        assert window[:12] == bytes(ids.tolist())
        assert row.text == window.decode(errors="replace")


def test_gradient_norms_add_up_to_the_global_norm(opened):
    state, corpus = opened
    view = replay.view_step(state, corpus)
    assert math.isclose(math.hypot(*view.grad_norms.values()), view.grad_norm, rel_tol=1e-5)
    _, metrics = train_step(state, next_batch(state, corpus), view.lr)
    assert metrics["grad_norm"].item() == view.grad_norm
    tight = state._replace(train_cfg=replace(state.train_cfg, grad_clip=0.01))
    scaled, norm = clip_by_global_norm(gradients_of(tight, corpus), 0.01)
    scale = global_norm(scaled) / norm
    assert math.isclose(replay.view_step(tight, corpus).clip, scale.item(), rel_tol=1e-5)


def gradients_of(state, corpus):
    batch = next_batch(state, corpus)
    cfg, rows = state.model_cfg, range(len(batch[0]))
    drop = dropout_of_step(state.train_cfg.seed, state.step, rows, cfg)
    return gradients(state.params, batch, cfg, drop)[0]


def test_what_is_not_a_number_comes_first_in_every_table(opened):
    from niels_gpt.cli.replay import _view_lines

    view = replay.view_step(*opened)
    rows = [row._replace(loss=math.nan) if i == 2 else row for i, row in enumerate(view.rows)]
    rows[2] = rows[2]._replace(text="the broken row")
    norms = {**view.grad_norms, "ln_f.bias": math.nan}
    lines = _view_lines(view._replace(rows=rows, grad_norms=norms))
    assert lines[lines.index("the row with the highest loss:") + 1] == "the broken row"
    first = lines[lines.index("largest gradient norms (before clipping)") + 1]
    assert first.split() == ["ln_f.bias", "nan"]


def test_a_step_whose_gradient_is_zero_or_not_a_number_is_shown(opened):
    state, corpus = opened
    flat = {name: torch.zeros_like(p) for name, p in state.params.items()}
    assert replay.view_step(state._replace(params=flat), corpus).clip == 1.0
    broken = {**state.params, "ln_f.bias": torch.full_like(state.params["ln_f.bias"], math.nan)}
    assert math.isnan(replay.view_step(state._replace(params=broken), corpus).clip)


def test_ctrl_c_is_not_taken_for_a_difference(run, again, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(replay, "replay_files", interrupted)
    assert again("--to", run / "latest.pt").exit_code == 130


def test_largest_activations_are_those_of_the_plain_module():
    state = make_state(SMALL, trained_state().train_cfg)
    x = torch.arange(200 * 12).reshape(200, 12) % 256  # several blocks of rows
    found = replay.largest_activations(state.params, x, SMALL, None)
    model = empty_model(SMALL).eval()
    model.load_state_dict({**state.params, "lm_head.weight": state.params["tok_emb.weight"]})
    with torch.no_grad():
        h = model.blocks[0](model.tok_emb(x))
        wanted = {"blocks.0": h, "ln_f": model.ln_f(model.blocks[1](h)), "lm_head": model(x)}
    for name, output in wanted.items():
        assert math.isclose(found[name], output.abs().max().item(), rel_tol=1e-5)
    assert next(iter(found)) == "tok_emb"
    assert list(found)[-1] == "lm_head"


def test_the_first_module_that_is_not_finite_is_named(run, again):
    def break_mlp(payload):
        payload["model_state"]["blocks.1.mlp.fc1.weight"].fill_(1e38)
        payload["model_state"]["blocks.1.ln2.weight"].fill_(1e38)

    change(run / "step_0000009.pt", break_mlp)
    result = again("--from", run / "step_0000009.pt", "--step", 10)
    assert result.exit_code == 0, result.output
    assert "not finite: first in blocks.1.mlp.fc1" in result.stdout
    result = again("--from", run / "step_0000009.pt", "--step", 10, "--json")
    assert json.loads(result.stdout)["loss"] is None


# --- the device --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recorded", "asked", "device"),
    [
        ("mps", None, "meta"),  # stands for a GPU that is here
        ("cuda:1", None, "cpu"),  # which is not
        ("mps", "cpu", "cpu"),
        (None, None, "cpu"),  # a checkpoint of another program
    ],
)
def test_the_device_is_that_of_the_run_unless_told_otherwise(
    whole_run, monkeypatch, recorded, asked, device
):
    def resolve(name):
        if name == "cuda:1":
            raise ValueError("not available")
        return {"mps": "meta"}.get(name, name)

    monkeypatch.setattr(replay, "resolve_device", resolve)
    environment = {} if recorded is None else {"device": recorded}
    checkpoint = replace(open_checkpoint(whole_run / "latest.pt"), environment=environment)
    state = replay.to_device(checkpoint, asked).state
    assert {t.device.type for tree in state.trees().values() for t in tree.values()} == {device}


def test_replay_leaves_the_choice_of_the_device_to_the_run(niels, monkeypatch):
    given = []
    monkeypatch.setattr(replay, "replay_files", lambda *args: given.append(args[3]))
    monkeypatch.setattr("niels_gpt.device.get_device", lambda: "mps")
    niels("replay", "--to", "latest.pt")
    niels("replay", "--to", "latest.pt", "--device", "cpu")
    assert given == [None, "cpu"]


def test_the_first_device_of_a_kind_is_the_device_of_that_kind():
    assert environment_changes({"device": "mps"}, {"device": "mps:0"}) == []
    assert environment_changes({"device": "cuda:0"}, {"device": "cuda"}) == []
    assert len(environment_changes({"device": "cuda"}, {"device": "cuda:1"})) == 1


def test_the_script_in_the_documents_runs(tmp_path, monkeypatch, texts):
    page = (ROOT / "docs" / "replay.md").read_text(encoding="utf-8")
    *_, script = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wiki").symlink_to(texts / "wiki")
    (tmp_path / "checkpoints").mkdir()
    cfg = TrainConfig(B=2, total_steps=2000, p_train={"wiki": 1.0})
    state = make_state(ModelConfig(T=12, C=8, L=1, H=2, d_ff=8), cfg)
    save_state(tmp_path / "checkpoints" / "step_0001000.pt", state._replace(step=1000))
    monkeypatch.chdir(tmp_path)
    exec(script, {})
