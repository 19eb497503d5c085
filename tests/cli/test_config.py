"""`niels-gpt config show`: each value and its origin."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt import paths
from niels_gpt.analysis.config_report import DEFAULT, OVERRIDE, resolve
from niels_gpt.config import ModelConfig, TrainConfig, load_config_from_json, to_dict
from tests.strategies import model_configs, train_configs

KEYS = [f"model.{k}" for k in to_dict(ModelConfig())]
KEYS += [f"train.{k}" for k in to_dict(TrainConfig()) if k != "p_train"]
SOURCES = [f"train.p_train.{name}" for name in ("wiki", "roam", "primer")]


def origins(settings):
    return {s.key: s.origin for s in settings}


def test_without_a_file_all_is_default():
    settings, resolved = resolve(None)
    assert origins(settings) == dict.fromkeys([*KEYS, *SOURCES], DEFAULT)
    assert resolved == {"model": to_dict(ModelConfig()), "train": to_dict(TrainConfig())}
    assert all(s.value == s.default and s.meaning for s in settings)


@given(model_configs(), train_configs(), st.sets(st.sampled_from(KEYS)), st.data())
def test_each_value_is_the_one_of_the_run_with_its_origin(tmp_path, model, train, kept, data):
    """Any part of any legal config in the file, any of its integers again by --set."""
    whole = {"model": to_dict(model), "train": to_dict(train)}
    doc = {section: {} for section in whole}
    for key in kept:
        section, _, name = key.partition(".")
        doc[section][name] = whole[section][name]
    path = tmp_path / "c.json"
    path.write_text(json.dumps(doc))
    asked = data.draw(st.sets(st.sampled_from(["train.seed", "train.B", "model.L", "model.T"])))
    overrides = [f"{key}=7" for key in asked]
    try:
        configs = load_config_from_json(path, overrides)
    except ValueError:  # the parts do not fit together
        with pytest.raises(ValueError, match=r"head width|does not divide|min_lr"):
            resolve(path, overrides)
        return
    settings, resolved = resolve(path, overrides)
    assert resolved == {name: to_dict(c) for name, c in zip(whole, configs, strict=True)}
    for key, origin in origins(settings).items():
        expected = OVERRIDE if key in asked else str(path) if key in kept else DEFAULT
        assert origin == expected, key


def test_the_shares_of_sources_are_told_apart(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"train": {"p_train": {"wiki": 0.5, "roam": 0.5}}}')
    settings, _ = resolve(path, ["train.p_train.wiki=0.4", "train.p_train.primer=0.1"])
    found = {s.key: (s.value, s.origin) for s in settings if s.key in SOURCES}
    assert found == {
        "train.p_train.wiki": (0.4, OVERRIDE),
        "train.p_train.roam": (0.5, str(path)),
        "train.p_train.primer": (0.1, OVERRIDE),
    }
    settings, _ = resolve(path, ['train.p_train={"wiki": 1.0}'])
    assert {s.key: s.origin for s in settings if s.key in SOURCES} == {SOURCES[0]: OVERRIDE}


def test_show_prints_a_line_per_value(niels):
    result = niels("config", "show", "--config", "quick", "--set", "train.B=8")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["key", "value", "from", "meaning"]
    assert max(map(len, lines[:-1])) <= 80
    first = [line.split()[0] for line in lines[1:-1] if not line.startswith(" ")]
    assert first == [*KEYS, *SOURCES]
    assert lines[-1] == f"quick.json is {paths.CONFIG_DIR / 'quick.json'}"
    (line,) = [line for line in lines if line.startswith("train.B ")]
    assert line.split(maxsplit=3) == ["train.B", "8", "--set", "rows per batch (default 32)"]


def test_the_json_holds_a_config_that_loads_again(niels, tmp_path):
    result = niels("config", "show", "--config", "smoke", "--set", "model.C=64", "--json")
    found = json.loads(result.stdout)
    path = tmp_path / "again.json"
    path.write_text(json.dumps(found["config"]))
    model, train = load_config_from_json(path)
    assert model == ModelConfig(C=64)
    assert (train.total_steps, found["from"]["model.C"]) == (1000, "--set")
    assert found["from"]["model.V"] == "default"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "absent"], "absent: no such config file"),
        (["--set", "train.b=8"], "did you mean train.B?"),
        (["--set", "model.H=3"], "H=3 does not divide C=256"),
    ],
)
def test_what_is_wrong_is_told(niels, args, message):
    result = niels("config", "show", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
