"""A run that begins with the weights of another: what it takes, and what it remembers."""

import json

import pytest
import torch

from niels_gpt.checkpoint import Ancestor, digest_of, load_checkpoint, open_checkpoint
from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.corpus import advance, open_corpus
from niels_gpt.data.sources import Given
from niels_gpt.optim import optimizer_of
from niels_gpt.state import TrainState, make_state, to_modules
from niels_gpt.streams import locate
from tests.run.conftest import TINY
from tests.training import same_state

MUON = ("--set", "train.optimizer=muon")


@pytest.fixture
def first(train):
    """Train a run in the folder a."""
    train("--out", "a", total_steps=4)


@pytest.mark.parametrize("more", [(), MUON], ids=["adamw", "muon"])
def test_a_run_begins_with_the_weights_at_step_0_with_a_new_optimizer(
    train, first, texts, tmp_path, more
):
    result = train("--from", "a/latest.pt", "--out", "b", *more, seed=1)
    assert result.exit_code == 0, result.output
    assert "starting from the weights of a/latest.pt after step 4" in result.stderr
    one = open_checkpoint(tmp_path / "b" / "step_0000001.pt").state
    params = open_checkpoint(tmp_path / "a" / "latest.pt").params
    opt_state = optimizer_of(one.train_cfg).init(params)
    state = TrainState(params, opt_state, 0, one.model_cfg, one.train_cfg)
    places = locate(Given({"wiki": texts / "wiki", "roam": texts / "notes"}))
    expected, _ = advance(state, open_corpus(one.model_cfg, one.train_cfg, places))
    assert same_state(one, expected)


def test_what_the_config_does_not_say_of_the_model_is_as_in_the_checkpoint(train, first, tmp_path):
    config = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps({"train": config["train"]}))
    result = train("--from", "a/latest.pt", "--out", "b", "--set", "model.dropout=0.3")
    assert result.exit_code == 0, result.output
    assert "a model of V 256, T 16, C 8, L 1, H 2, d_ff 8, dropout 0.1" in result.stderr
    found = open_checkpoint(tmp_path / "b" / "latest.pt").cfg
    assert found == ModelConfig(**{**TINY["model"], "dropout": 0.3})


def test_another_shape_is_refused_with_a_line_per_field(train, first, tmp_path):
    more = ["--set", "model.d_ff=16", "--set", "model.T=8", "--set", "model.dropout=0"]
    for how in ([], ["--dry-run"]):
        result = train("--from", "a/latest.pt", "--out", "b", *more, *how)
        assert result.exit_code == 2
        assert "T: checkpoint 16, config 8\n" in result.stderr
        assert "d_ff: checkpoint 8, config 16\n" in result.stderr
        assert "dropout" not in result.stderr
    assert not list((tmp_path / "b").glob("*.pt"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--from", "a/latest.pt", "--resume", "a/latest.pt"], "give one of them"),
        (["--from", "a", "--out", "b"], "--from a: is a folder; name a checkpoint in it"),
        (["--from", "nowhere.pt", "--out", "b"], "--from nowhere.pt: no such checkpoint"),
        (["--from", "c.json", "--out", "b"], "c.json: "),
    ],
)
def test_what_is_no_checkpoint_to_begin_with_is_refused(train, first, tmp_path, args, words):
    result = train(*args)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "b").glob("*.pt"))


def test_a_dry_run_takes_the_weights_and_writes_nothing(train, first, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = train("--from", "a/latest.pt", "--out", "b", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "starting from the weights of a/latest.pt" in result.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_a_resume_under_another_optimizer_says_that_from_allows_it(train, first):
    result = train("--resume", "a/latest.pt", *MUON)
    assert result.exit_code == 2
    assert "start a new run from the weights (--from)" in result.stderr
    assert train("--from", "a/latest.pt", "--out", "b", *MUON).exit_code == 0


def test_a_checkpoint_tells_the_whole_descent_of_its_weights(train, first, niels, tmp_path):
    train("--from", "a/step_0000003.pt", "--out", "b", total_steps=2)
    train("--from", "b/latest.pt", "--out", "c", total_steps=2)
    a, b, c = (
        open_checkpoint(tmp_path / name)
        for name in ("a/step_0000003.pt", "b/latest.pt", "c/latest.pt")
    )
    assert "ancestors" not in load_checkpoint(a.path, device="cpu")
    assert c.ancestors == (Ancestor(b.digest, 2), Ancestor(a.digest, 3))
    shown = niels("checkpoint", "info", "c/latest.pt").stdout
    assert f"began with    the weights after step 2 of another run, sha256 {b.digest[:12]}" in shown
    assert f"before that   the weights after step 3 of another run, sha256 {a.digest[:12]}" in shown
    found = json.loads(niels("checkpoint", "info", "c/latest.pt", "--json").stdout)
    assert found["ancestors"][1] == {"digest": a.digest, "step": 3}
    assert (
        f"first weights: {a.digest} -> {b.digest}"
        in niels("checkpoint", "diff", "b/latest.pt", "c/latest.pt").stdout
    )


def test_a_resume_keeps_the_descent_and_ends_in_the_same_bytes(train, first, tmp_path):
    train("--from", "a/latest.pt", "--out", "b")
    whole = {p.name: p.read_bytes() for p in (tmp_path / "b").glob("*.pt")}
    assert train("--resume", "b/step_0000003.pt").exit_code == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").glob("*.pt")} == whole


def test_a_plain_checkpoint_is_a_beginning(train, niels, tmp_path):
    """A loop that knows nothing of this program wrote it, without a digest."""
    model, optimizer = to_modules(make_state(ModelConfig(**TINY["model"]), TrainConfig()))
    torch.save(
        {
            "model_cfg": TINY["model"],
            "train_cfg": {"any": "thing"},
            "model_state": model.state_dict(),
            "optimizer_state": optimizer.state_dict(),
            "step": 7,
            "best_val_loss": None,
        },
        tmp_path / "plain.pt",
    )
    result = train("--from", "plain.pt", "--out", "b", total_steps=2)
    assert result.exit_code == 0, result.output
    expected = Ancestor(digest_of(open_checkpoint(tmp_path / "plain.pt")), 7)
    assert open_checkpoint(tmp_path / "b" / "latest.pt").ancestors == (expected,)


@pytest.mark.parametrize("wrong", ["x", ["x"], [{"digest": "x"}], [{"digest": "x", "step": "1"}]])
def test_a_descent_of_another_kind_is_refused(first, tmp_path, train, wrong):
    from niels_gpt.schema import write_payload

    payload = load_checkpoint(tmp_path / "a" / "latest.pt", device="cpu")
    write_payload([tmp_path / "x.pt"], {**payload, "ancestors": wrong})
    result = train("--from", "x.pt", "--out", "b")
    assert result.exit_code == 2
    assert "ancestors" in result.stderr


@pytest.fixture
def replay(niels, texts):
    """Run `niels-gpt replay ARGS`."""
    where = ["--wiki", texts / "wiki", "--roam", texts / "notes"]
    return lambda *args: niels("replay", *where, *args)


def test_a_replay_finds_the_first_weights(train, first, replay, tmp_path):
    train("--from", "a/latest.pt", "--out", "b", total_steps=3)
    result = replay("--to", "b/latest.pt")
    assert result.exit_code == 0, result.output
    assert "identical: every bit of latest.pt" in result.stdout
    assert "began with the weights of" in result.stderr
    view = replay("--from", "b", "--step", 1)
    assert view.exit_code == 0, view.output
    loss = json.loads((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert f"step 1: loss {loss:.4f} nats" in view.stdout


def test_a_replay_finds_first_weights_that_the_run_itself_moved_aside(train, first, replay):
    train("--from", "a/latest.pt", "--out", "a", total_steps=3)
    result = replay("--to", "a/latest.pt")
    assert result.exit_code == 0, result.output
    assert "earlier-001/latest.pt, after step 4 of its own" in result.stderr


def test_first_weights_that_are_elsewhere_can_be_named(train, first, replay, tmp_path):
    train("--from", "a/latest.pt", "--out", "x/y/b", total_steps=3)
    lost = replay("--to", "x/y/b/latest.pt")
    assert lost.exit_code == 2
    assert "name it with --from and --to" in lost.stderr
    found = replay("--from", "a/latest.pt", "--to", "x/y/b/latest.pt")
    assert found.exit_code == 0, found.output
    wrong = replay("--from", "a/step_0000003.pt", "--to", "x/y/b/latest.pt")
    assert wrong.exit_code == 2
    assert "their first weights differ" in wrong.stderr


def test_a_sweep_begins_with_the_weights_as_a_run_does(train, first, niels, texts, tmp_path):
    rate, places = 0.003, ["--wiki", texts / "wiki", "--roam", texts / "notes"]
    least = rate * (TrainConfig().min_lr / TrainConfig().base_lr)
    train("--from", "a/latest.pt", "--out", "b", total_steps=3, base_lr=rate, min_lr=least)
    sets = ["--set", "train.total_steps=3"]
    args = ["--config", "c.json", "--from", "a/latest.pt", "--lr", rate, "--solo", "--json"]
    result = niels("sweep", *args, *sets, *places)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["results"]
    assert found["val_loss"] == open_checkpoint(tmp_path / "b" / "latest.pt").scores.val_loss
