"""`niels-gpt checkpoint`: info, verify, diff and export of what a training leaves."""

from __future__ import annotations

import importlib.util
import json
import math
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt import schema
from niels_gpt.analysis.checkpoint_report import compare
from niels_gpt.checkpoint import checkpoint_of, load_checkpoint, write_checkpoint
from niels_gpt.config import to_dict
from niels_gpt.files.names import step_name
from niels_gpt.files.torchfile import read_torch_file
from niels_gpt.inference.export import to_safetensors
from niels_gpt.loss import forward
from niels_gpt.rng import make_generator
from niels_gpt.schema import parameter_shapes, write_payload
from tests import ROOT
from tests.checkpoints import TINY, any_finite_bits, random_payload, random_state, states
from tests.trained import SMALL, lively_state, save_lively

EXAMPLE = ROOT / "examples" / "load_export.py"


@pytest.fixture
def checkpoint(tmp_path):
    return save_lively(tmp_path / "latest.pt")


# --- info --------------------------------------------------------------------------------------


def test_info_tells_what_the_file_holds(niels, tmp_path):
    path = tmp_path / "latest.pt"
    digest = write_payload([path], random_payload(step=1234))
    found = json.loads(niels("checkpoint", "info", path, "--json").stdout)
    assert found["path"] == str(path)
    assert found["file_bytes"] == path.stat().st_size
    assert (found["step"], found["best_val_loss"], found["digest"]) == (1234, 1.5, digest)
    assert found["model_cfg"] == to_dict(TINY)
    assert found["parameters"] == sum(math.prod(s) for s in parameter_shapes(TINY).values())
    assert found["has_optimizer_state"] is True
    text = niels("checkpoint", "info", path).stdout
    for piece in ("1,234", "1.5000 nats", digest, "dropout 0.0"):
        assert piece in text
    assert max(map(len, text.splitlines())) <= max(100, 20 + len(str(path)))


def test_info_of_another_programs_file_says_so(niels, tmp_path):
    path = tmp_path / "plain.pt"
    torch.save({**random_payload(), "optimizer_state": None}, path)
    result = niels("checkpoint", "info", path)
    assert result.exit_code == 0, result.stderr
    assert "none: written by another program" in result.stdout
    assert "has no optimizer state" in result.stdout


@pytest.mark.parametrize("place", ["train_cfg", "sources", "environment"])
@pytest.mark.parametrize("command", [("info", "--json"), ("info",), ("diff", "latest.pt")])
def test_tensors_among_the_settings_are_refused(niels, checkpoint, tmp_path, place, command):
    path, sources = tmp_path / "plain.pt", {"train": {}, "val": {}, "more": torch.ones(2)}
    settings = {"train_cfg": {"lr": torch.ones(2)}, "environment": {"x": [torch.ones(2)]}}
    torch.save({**random_payload(), place: {**settings, "sources": sources}[place]}, path)
    result = niels("checkpoint", *command, path)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {path}: {place}.")
    assert "is a tensor, not a plain value" in result.stderr


def test_info_cuts_what_is_too_long_to_be_wrapped(niels, tmp_path):
    path = tmp_path / "a.pt"
    torch.save({**random_payload(), "train_cfg": {"words": "x" * 3_000_000}}, path)
    result = niels("checkpoint", "info", path)
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout) < 20_000
    assert "2,990,020 more characters; see --json" in result.stdout
    whole = json.loads(niels("checkpoint", "info", path, "--json").stdout)
    assert whole["train_cfg"] == {"words": "x" * 3_000_000}


@pytest.mark.parametrize("command", [("info",), ("diff", "latest.pt"), ("verify",)])
def test_a_missing_file_is_told(niels, checkpoint, command):
    result = niels("checkpoint", *command, "absent.pt")
    assert result.exit_code == 2
    assert "absent.pt" in result.stderr + result.stdout
    assert "Traceback" not in result.output


def test_a_folder_is_no_checkpoint_but_holds_one(niels, checkpoint, tmp_path):
    result = niels("checkpoint", "info", tmp_path)
    assert result.exit_code == 2
    assert "is a folder, not a checkpoint; the newest good checkpoint here is latest.pt" in (
        result.stderr
    )


# --- verify ------------------------------------------------------------------------------------


@given(st.data())
def test_verify_finds_any_flipped_bit_or_proves_it_harmless(niels, tmp_path, data):
    path = tmp_path / "latest.pt"
    write_payload([path], random_payload())
    whole = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[place // 8] ^= 1 << place % 8
    path.write_bytes(whole)
    result = niels("checkpoint", "verify", path, "--json")
    (verdict,) = json.loads(result.stdout)
    assert result.exit_code == (1 if verdict["problem"] else 0)
    if not verdict["problem"]:
        assert verdict["digest"] == load_checkpoint(path, device="cpu")["digest"]


def test_verify_reads_each_file_once_however_many_are_damaged(niels, tmp_path, monkeypatch):
    for step in range(1, 7):
        (tmp_path / step_name(step)).write_bytes(b"damaged")
    reads = []
    monkeypatch.setattr(schema, "read_torch_file", lambda p: reads.append(p) or read_torch_file(p))
    result = niels("checkpoint", "verify", tmp_path)
    assert result.exit_code == 1
    assert result.stdout.count("BAD") == len(reads) == 6


def test_verify_takes_files_and_folders(niels, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("latest.pt", "best.pt", "step_0000003.pt"):
        write_payload([tmp_path / "run" / name], random_payload())
    other = tmp_path / "other.pt"
    write_payload([other], random_payload())
    good = niels("checkpoint", "verify", tmp_path / "run", other)
    assert good.exit_code == 0
    assert good.stdout.count("good  ") == 4
    (tmp_path / "run" / "best.pt").write_bytes(b"")
    bad = niels("checkpoint", "verify", tmp_path / "run", other)
    assert bad.exit_code == 1
    assert bad.stdout.count("good  ") == 3
    assert f"BAD   {tmp_path / 'run' / 'best.pt'}: " in bad.stdout


def test_a_folder_without_checkpoints_is_told(niels, tmp_path):
    result = niels("checkpoint", "verify", tmp_path)
    assert result.exit_code == 2
    assert "no checkpoints in this folder" in result.stderr


# --- diff --------------------------------------------------------------------------------------


@given(states())
def test_a_checkpoint_does_not_differ_from_itself(state):
    found = compare(checkpoint_of(state), checkpoint_of(state))
    assert (found.settings, found.parameters, found.unlike) == ([], [], [])
    assert found.same == len(state.params)


def test_a_zero_of_another_sign_is_a_change():
    a = checkpoint_of(random_state())
    params = {**a.params, "ln_f.bias": torch.zeros(TINY.C)}
    other = replace(a, params={**params, "ln_f.bias": -params["ln_f.bias"]})
    found = compare(replace(a, params=params), other)
    assert [(change.name, change.largest) for change in found.parameters] == [("ln_f.bias", 0.0)]
    assert found.same == len(a.params) - 1


def test_changes_are_measured_and_ordered(niels, tmp_path):
    a = lively_state()
    b = a._replace(step=7, params={name: p.clone() for name, p in a.params.items()})
    b.params["ln_f.weight"].mul_(1.5)
    b.params["tok_emb.weight"][3, 2] += 0.25
    for name, state in (("a.pt", a), ("b.pt", b)):
        write_checkpoint([tmp_path / name], checkpoint_of(state))
    found = json.loads(niels("checkpoint", "diff", "a.pt", "b.pt", "--json").stdout)
    assert found["settings"] == [["step", 0, 7]]
    assert [c["name"] for c in found["parameters"]] == ["ln_f.weight", "tok_emb.weight"]
    assert found["parameters"][0]["relative"] == pytest.approx(0.5)
    assert found["parameters"][1]["largest"] == pytest.approx(0.25, abs=1e-5)
    assert found["same"] == len(a.params) - 2
    text = niels("checkpoint", "diff", "a.pt", "b.pt", "-n", "1").stdout
    assert "step: 0 -> 7" in text
    assert "and 1 more" in text


def test_models_of_different_shape_are_compared_as_far_as_they_go(niels, tmp_path):
    for name, L in (("a.pt", 1), ("b.pt", 2)):
        cfg = SMALL.__class__(**{**to_dict(SMALL), "L": L})
        save_lively(tmp_path / name, cfg)
    found = json.loads(niels("checkpoint", "diff", "a.pt", "b.pt", "--json").stdout)
    assert ["model_cfg.L", 1, 2] in found["settings"]
    assert found["unlike"]
    assert all(name.startswith("blocks.1.") for name in found["unlike"])
    assert (
        f"{len(found['unlike'])} parameters" in niels("checkpoint", "diff", "a.pt", "b.pt").stdout
    )


# --- export ------------------------------------------------------------------------------------


def read_safetensors(data):
    """Read the format by its definition, without the package."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert length % 8 == 0
    values, ends = memoryview(data)[8 + length :], [0]
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        assert (entry["dtype"], start) == ("F32", ends[-1])
        ends.append(end)
        raw = torch.frombuffer(bytearray(values[start:end]), dtype=torch.float32)
        tensors[name] = raw.view(entry["shape"])
    assert ends[-1] == len(values)
    return tensors


@given(st.dictionaries(st.text(max_size=9), st.lists(st.integers(1, 5), max_size=3), min_size=1))
def test_what_is_exported_is_what_is_read(shapes):
    shapes.pop("__metadata__", None)
    generator = make_generator(1)
    tensors = {name: any_finite_bits(tuple(shape), generator) for name, shape in shapes.items()}
    found = read_safetensors(to_safetensors(tensors))
    assert list(found) == list(tensors)
    for name, t in tensors.items():
        assert torch.equal(found[name].view(torch.int32), t.view(torch.int32))


def test_export_writes_the_model_and_its_config(niels, checkpoint, tmp_path):
    result = niels("checkpoint", "export", checkpoint, "out/model.safetensors")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split() == ["out/model.safetensors", "out/model.json"]
    tensors = read_safetensors((tmp_path / "out" / "model.safetensors").read_bytes())
    config = json.loads((tmp_path / "out" / "model.json").read_text())
    assert config["model"] == to_dict(SMALL)
    assert config["tied"] == {"lm_head.weight": "tok_emb.weight"}
    state = lively_state()
    assert {name: tuple(t.shape) for name, t in tensors.items()} == parameter_shapes(SMALL)
    assert all(torch.equal(t, state.params[name]) for name, t in tensors.items())


def test_numbers_that_json_lacks_are_exported_as_null(niels, tmp_path):
    """A plain loop may begin with a best loss of infinity."""
    other = {"best_val_loss": math.inf, "train_cfg": {"best": [math.nan], "in": "caf\udce9"}}
    torch.save({**random_payload(), **other}, tmp_path / "plain.pt")
    assert niels("checkpoint", "export", "plain.pt", "out.safetensors").exit_code == 0
    description = json.loads((tmp_path / "out.json").read_text())
    assert (description["best_val_loss_nats"], description["train"]) == (
        None,
        {"best": [None], "in": "caf\udce9"},
    )
    verified = niels("checkpoint", "verify", "out.safetensors")
    assert verified.exit_code == 0, verified.output


def test_export_replaces_nothing_unless_told(niels, checkpoint, tmp_path):
    (tmp_path / "m.json").write_text("mine")
    refused = niels("checkpoint", "export", checkpoint, "m.safetensors")
    assert refused.exit_code == 2
    assert "m.json: exists already; --force replaces it" in refused.stderr
    assert (tmp_path / "m.json").read_text() == "mine"
    assert not (tmp_path / "m.safetensors").exists()
    assert niels("checkpoint", "export", checkpoint, "m.safetensors", "--force").exit_code == 0
    assert (tmp_path / "m.json").read_text() != "mine"
    other = niels("checkpoint", "export", checkpoint, "model.bin")
    assert (other.exit_code, "must end in .safetensors" in other.stderr) == (2, True)


def test_verify_tells_whether_an_export_belongs_together(niels, checkpoint, tmp_path):
    model, config = tmp_path / "m.safetensors", tmp_path / "m.json"
    niels("checkpoint", "export", checkpoint, model)
    good = niels("checkpoint", "verify", model)
    assert (good.exit_code, good.stdout.split(":")[0]) == (0, f"good  {model}")
    text = config.read_text()
    for damaged, why in {
        text.replace('"step": ', '"step": "'): "m.json",
        text.replace('"sha256": "', '"sha256": "0'): "m.json does not describe this model",
        text.replace('"sha256"', '"other"'): "m.json does not describe this model",
        text.replace('"step"', '"other"'): "m.json does not describe this model",
        "[]": "m.json does not describe this model",
        None: "m.json is missing: the export was not finished",
    }.items():
        config.unlink()
        if damaged is not None:
            config.write_text(damaged)
        bad = niels("checkpoint", "verify", model)
        assert bad.exit_code == 1
        assert bad.stdout.startswith(f"BAD   {model}: ")
        assert why in bad.stdout
    assert niels("checkpoint", "verify", "absent.safetensors").exit_code == 2


KILLED_EXPORTS = """
import os, sys
from pathlib import Path
from niels_gpt.inference.export import export, read_export

other, new = map(Path, sys.argv[1:])
out = Path("out/m.safetensors")
left = iter(())

def kill(event, args):
    writes = event in ("os.rename", "os.remove") or event == "open" and args[2] & os.O_CREAT
    if writes and next(left, None) is None:
        os._exit(9)

sys.addaudithook(lambda *seen: kill(*seen) if os.getpid() != parent else None)
parent, code, calls = os.getpid(), 9, 0
while code == 9:
    export(other, out, overwrite=True)
    before = out.read_bytes()
    if (pid := os.fork()) == 0:
        left = iter(range(calls))
        export(new, out, overwrite=True)
        os._exit(0)
    code, calls = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), calls + 1
    if out.with_suffix(".json").exists():
        step, _ = read_export(out)
        assert step == (5 if out.read_bytes() == before else 0), calls
assert code == 0
print(calls)
"""


def test_an_export_killed_at_any_call_leaves_no_pair_that_does_not_match(checkpoint, tmp_path):
    write_checkpoint([tmp_path / "other.pt"], checkpoint_of(lively_state(seed=1)._replace(step=5)))
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", KILLED_EXPORTS, "other.pt", checkpoint]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 7


def test_the_example_computes_the_same_logits(niels, checkpoint, tmp_path):
    """The program of the documentation: no niels_gpt, at most 30 lines of code."""
    safetensors = pytest.importorskip("safetensors.torch", reason="needs the extra `export`")
    niels("checkpoint", "export", checkpoint, "m.safetensors")
    spec = importlib.util.spec_from_file_location("load_export", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    w = safetensors.load_file(tmp_path / "m.safetensors")
    cfg = json.loads((tmp_path / "m.json").read_text())["model"]
    ids = torch.randint(256, (SMALL.T,), generator=make_generator(4))
    expected = forward(lively_state().params, ids[None], SMALL)[0]
    torch.testing.assert_close(example.logits(w, cfg, ids), expected, rtol=1e-4, atol=1e-4)


def test_the_example_is_short_and_stands_alone():
    source = EXAMPLE.read_text()
    code = [line for line in source.split('"""')[2].splitlines() if line.strip()]
    assert len(code) <= 30
    assert "niels_gpt" not in "".join(code)


def test_a_random_state_survives_the_export(niels, tmp_path):
    """Denormals, both zeros and the largest floats: bit for bit."""
    state = random_state(SMALL)
    write_checkpoint([tmp_path / "a.pt"], checkpoint_of(state))
    assert niels("checkpoint", "export", "a.pt", "a.safetensors").exit_code == 0
    found = read_safetensors((tmp_path / "a.safetensors").read_bytes())
    for name, p in state.params.items():
        assert torch.equal(found[name].view(torch.int32), p.view(torch.int32))
