"""Every path that a user takes on a Mac's GPU, on the stand-in for it: see `tests.metal`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from niels_gpt import ModelConfig, TrainState, evaluate, from_modules, to_modules
from niels_gpt.batching import get_batch
from niels_gpt.checkpoint import open_checkpoint
from niels_gpt.cli import main
from niels_gpt.eval import eval_loss_on_stream
from niels_gpt.model.gpt import _embed
from niels_gpt.optim.trees import map_tensors
from niels_gpt.run import selfcheck
from niels_gpt.run.metrics import read_metrics
from tests.metal import DEVICE, LEGAL, Faulty, Metal, runs_on_mps
from tests.training import same_bits, same_state

RUNS = {
    "adamw": {"optimizer": "adamw", "init": "normal"},
    "muon": {"optimizer": "muon", "init": "fan_in"},
}
DROPOUT = {"adamw": 0.1, "muon": 0.0}
# Two blocks of rows and of queries; more than 32,766 parameters.
MODEL = {"T": 70, "C": 64, "L": 1, "H": 2, "d_ff": 96}
TRAIN = {
    **{"B": 30, "total_steps": 4, "warmup_steps": 0, "log_every": 1},
    **{"eval_every": 2, "eval_steps": 1, "ckpt_every": 1},
}

TEXTS = ["--wiki", "{texts}/wiki", "--roam", "{texts}/notes"]
NEW = ["train", "--config", "{config}", *TEXTS]
START = [*NEW, "--out", "{run}"]
SWEEP = ["sweep", "--config", "{config}", *TEXTS, "--set", "train.total_steps=1"]
ONCE = ["--iterations", "1"]
COMMANDS = {
    "train": [*START, "--set", "train.total_steps=2", "--no-sample"],
    "resume": [*START, "--resume", "latest"],
    "from": [*NEW, "--from", "{ckpt}", "--out", "{run}/new", "--no-sample"],
    "dry run": [*NEW, "--dry-run"],
    "evaluate": ["evaluate", "--ckpt", "{ckpt}", *TEXTS],
    "evaluate every byte": ["evaluate", "--ckpt", "{ckpt}", *TEXTS, "--full"],
    "sample": ["sample", "--ckpt", "{ckpt}", "-n", "3", "--max-bytes", "80", "--top-k", "40"],
    "chat": ["chat", "--ckpt", "{ckpt}", "--message", "hello", "--max-bytes", "8"],
    "replay": ["replay", "--from", "{run}/step_0000001.pt", "--to", "{ckpt}", *TEXTS],
    "inside a step": ["replay", "--from", "{run}", "--step", "2", *TEXTS],
    "noise": ["inspect", "--ckpt", "{ckpt}", *TEXTS, "--only", "noise", "--batches", "1"],
    "sharpness": ["inspect", "--ckpt", "{ckpt}", *TEXTS, "--only", "sharpness", *ONCE],
    "influence": ["inspect", "--ckpt", "{ckpt}", *TEXTS, "--only", "documents"],
    "sweep": [*SWEEP, "--lr", "1e-3,2e-3", "--together"],
    "sweep one by one": [*SWEEP, "--lr", "1e-3", "--solo"],
}
TEXT = bytes(range(256))


def resolve(name: str | None) -> str:
    return str(DEVICE) if name == "mps" else name or "cpu"


def on_the_cpu(state: TrainState) -> TrainState:
    return map_tensors(torch.Tensor.cpu, state)


class Home:
    """A folder with a config, and the run that commands start from."""

    def __init__(self, name: str, folder: Path, texts: Path) -> None:
        self.run, config = folder / "run", folder / "config.json"
        model = {**MODEL, "dropout": DROPOUT[name]}
        config.write_text(json.dumps({"model": model, "train": {**TRAIN, **RUNS[name]}}))
        ckpt = self.run / "step_0000002.pt"
        self.places = {"texts": texts, "run": self.run, "config": config, "ckpt": ckpt}
        self.done: dict[str, tuple[Result, Metal]] = {}

    def command(self, name: str) -> tuple[Result, Metal]:
        """Run a command on the stand-in, after `train`; return the result and what was seen."""
        if name != "train":
            self.command("train")
        if name not in self.done:
            words = [word.format(**self.places) for word in COMMANDS[name]]
            with Metal() as metal:
                result = CliRunner().invoke(main, [*words, "--device", "mps"])
            self.done[name] = result, metal
        return self.done[name]


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[None]:
    """Let the commands take the stand-in's device for mps."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("device", "run.origin", "analysis.replay"):
            patch.setattr(f"niels_gpt.{module}.resolve_device", resolve)
        yield


@pytest.fixture(scope="module", params=RUNS)
def home(request, tmp_path_factory, texts) -> Home:
    return Home(request.param, tmp_path_factory.mktemp("home"), texts)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_keeps_the_rules(home, name):
    result, metal = home.command(name)
    assert result.exit_code == 0, result.output
    assert len(metal.names) > 20
    assert not metal.faults


def test_the_selfcheck_keeps_the_rules(monkeypatch):
    monkeypatch.setattr(selfcheck, "MODEL", ModelConfig(**MODEL, dropout=0.1))
    monkeypatch.setattr(selfcheck, "STEPS", 1)
    with Metal() as metal:
        result = CliRunner().invoke(main, ["selfcheck", "--device", "mps"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"{DEVICE}: as it should be"
    assert not metal.faults


def test_the_library_keeps_the_rules(home):
    home.command("train")
    numbers = {"B": 30, "T": 70, "device": str(DEVICE), "eval_steps": 1, "seed": 1}
    with Metal() as metal:
        state = open_checkpoint(home.places["ckpt"], DEVICE).state
        model, optimizer = to_modules(state)
        again = from_modules(model, optimizer, state.train_cfg)
        losses = evaluate(state, TEXT, 1), eval_loss_on_stream(model, stream=TEXT, **numbers)
        assert same_state(on_the_cpu(again), on_the_cpu(state))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert not metal.faults


def test_a_run_begins_with_a_check_of_the_device(home):
    said = home.command("train")[0].stdout
    assert f"{DEVICE}: gradients, twice: 45,600 values, the same bits" in said
    assert f"{DEVICE}: gradients as on the CPU: differ by" in said


def test_a_run_on_a_device_that_does_not_repeat_its_bits_begins_with_a_warning(home, tmp_path):
    words = [word.format(**{**home.places, "run": tmp_path}) for word in COMMANDS["train"]]
    with Faulty("mm", 1e-6, each_time=True):
        result = CliRunner().invoke(main, [*words, "--device", "mps"])
    assert result.exit_code == 0, result.output
    (warning,) = (line for line in result.stderr.splitlines() if line.startswith("warning: "))
    assert f"{DEVICE}: gradients, twice: " in warning
    assert f"see niels-gpt selfcheck --device {DEVICE}, or use --device cpu" in warning


# --- the same as on the CPU ----------------------------------------------------------------------


def losses_of(home: Home, run: Path, *devices: str) -> list[float]:
    """Train two steps on each device in turn; return the logged losses."""
    for i, device in enumerate(devices, 1):
        words = [word.format(**{**home.places, "run": run}) for word in START]
        resumed = ["--resume", "latest"] * (i > 1)
        steps = ["--set", f"train.total_steps={2 * i}", "--device", device, "--no-sample"]
        with Metal():
            result = CliRunner().invoke(main, [*words, *resumed, *steps])
        assert result.exit_code == 0, result.output
        told = f"device: '{resolve(devices[i - 2])}' in the checkpoint, now '{resolve(device)}'"
        assert (told in result.stderr) == (i > 1 and device != devices[i - 2])
    return [r["loss"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]


def test_a_run_may_move_between_devices_and_differs_by_rounding_only(home, tmp_path):
    here = losses_of(home, tmp_path / "here", "cpu", "cpu")
    assert len(here) == 4
    for name, devices in {"there": ("cpu", "mps"), "back": ("mps", "cpu")}.items():
        assert losses_of(home, tmp_path / name, *devices) == pytest.approx(here, rel=1e-4)


def test_a_checkpoint_goes_from_one_device_to_the_other_with_its_bits(home):
    home.command("train")
    path = home.places["ckpt"]
    with Metal():
        on_device = open_checkpoint(path, DEVICE).state
        assert on_device.device == DEVICE
        back = on_the_cpu(on_device)
    assert same_state(back, open_checkpoint(path).state)


def test_a_batch_is_the_same():
    def batch(device):
        generator = torch.Generator().manual_seed(1)
        return get_batch({"a": TEXT}, p={"a": 1.0}, B=3, T=5, device=device, generator=generator)

    with Metal() as metal:
        there = [ids.cpu() for ids in batch(DEVICE)]
    assert all(same_bits(a, b) for a, b in zip(there, batch("cpu"), strict=True))
    assert not metal.faults


def test_rows_of_the_embedding_are_exact():
    table, x = torch.nn.Embedding(256, 8), torch.arange(140).view(2, 70)
    with Metal() as metal:
        there = torch.nn.Embedding.from_pretrained(table.weight.detach().to(DEVICE))
        rows = _embed(there, x.to(DEVICE)).cpu()
    assert same_bits(rows, table(x).detach())
    assert "mm" in metal.names


# --- the rules see what they forbid ---------------------------------------------------------------

BROKEN = {
    "no kernel": lambda x: torch.linalg.ldl_factor(x),
    "torch.float64": lambda x: x.double(),
    "torch.complex64": lambda x: torch.zeros(2, dtype=torch.complex64, device=x.device),
    "adds by atomics": lambda x: x.index_add(0, torch.tensor([0, 0], device=x.device), x[:2]),
    "stride 0 in (2, 3, 3)": lambda x: torch.bmm(x.expand(2, 3, 3), x.repeat(2, 1, 1)),
    "inner size 32767": lambda x: x.new_ones(1, 32767) @ x.new_ones(32767, 1),
    "torch.uint8 from byte 1": lambda x: x.to(torch.uint8).flatten()[1:].to(torch.int64),
    "a number at place 1": lambda x: x * torch.ones(2)[1],
    "two devices, (3, 3)": lambda x: torch.cat([x, torch.ones(3, 3)]),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_each_rule_sees_what_it_forbids(fault):
    with Metal() as metal:
        BROKEN[fault](torch.eye(3).to(DEVICE))
    assert any(fault in found for found in metal.faults), metal.faults


def test_what_is_on_the_cpu_is_left_alone():
    with Metal() as metal:
        torch.eye(3).double() @ torch.eye(3).double()
    assert not metal.names
    assert torch.float64 not in LEGAL


def test_the_table_knows_what_mps_lacks():
    assert runs_on_mps("mm")
    assert runs_on_mps("add.Tensor")
    assert not runs_on_mps("linalg_ldl_factor_ex")
    assert not runs_on_mps("no_such_operation")
