"""What the package says where it cannot run, and that its packaging says the same."""

import dataclasses
import importlib
import re
import subprocess
import sys
import tomllib

import pytest

from niels_gpt.streams import StreamBuildConfig
from tests import ROOT


@pytest.mark.parametrize(
    ("pretended", "said"),
    [
        (
            "sys.version_info = (3, 9, 6)",
            r"needs Python 3\.11 or newer, and .* Python 3\.9\.6: ",
        ),
        ("sys.platform = 'win32'", r"runs on macOS and Linux; on Windows, run it inside WSL$"),
    ],
)
@pytest.mark.parametrize("module", ["niels_gpt", "niels_gpt.train", "niels_gpt.cli"])
def test_a_machine_that_it_cannot_run_on_is_told_so(pretended, said, module):
    code = f"import sys; {pretended}; import {module}"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert re.match(f"error: niels_gpt {said}", result.stderr.rstrip()), result.stderr
    assert result.stderr.count("\n") == 1


def test_what_it_asks_of_python_is_written_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    versions = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert versions == ["3.11", "3.12", "3.13", "3.14"]
    assert f"Python {versions[0]} to {versions[-1]}" in (ROOT / "README.md").read_text()


def test_constraints_name_what_is_required():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.partition("==")[::2] for line in lines if not line.startswith("#"))
    for requirement in project["dependencies"]:
        name, _, lowest = requirement.partition(">=")
        # without the marker, an older pip blames the constraint and not the Python
        assert re.fullmatch(r'[\d.]+; python_version >= "3\.11"', pinned[name])
        assert numbers(pinned[name].partition(";")[0]) >= numbers(lowest)


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("niels_gpt", "make_state train_step evaluate TrainState ModelConfig TrainConfig"),
        ("niels_gpt", "to_modules from_modules gradients"),
        ("niels_gpt.model", "GPT CausalSelfAttention rope_cache apply_rope"),
        ("niels_gpt.config", "load_config_from_json load_json save_json to_dict default_p_train"),
        ("niels_gpt.checkpoint", "save_checkpoint load_checkpoint validate_model_config_match"),
        ("niels_gpt.train", "make_state train_step evaluate main"),
        ("niels_gpt.streams", "StreamBuildConfig build_sources build_train_val_sources"),
    ],
)
def test_what_others_import_is_at_its_address(module, names):
    found = importlib.import_module(module)
    assert [name for name in names.split() if not hasattr(found, name)] == []


def test_streams_are_built_as_other_programs_expect():
    cfg = StreamBuildConfig()
    assert (cfg.T, cfg.seed, cfg.roam_val_frac, cfg.primer_val_frac) == (256, 42, 0.1, 0.1)
    assert cfg.enabled_sources == cfg.required_sources == ("wiki", "roam", "primer")
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.T = 1
