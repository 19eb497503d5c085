"""Configs: what is valid, what is refused and how, and that documents survive saving."""

import dataclasses
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from niels_gpt import paths
from niels_gpt.config import (
    ModelConfig,
    TrainConfig,
    apply_overrides,
    config_from_dict,
    default_p_train,
    find_config,
    load_config_from_json,
    load_json,
    to_dict,
)
from niels_gpt.data.sources import SOURCES
from tests import ROOT
from tests.strategies import json_values, model_configs, probabilities, train_configs

CONFIGS = ROOT / "configs"
SMOKE = {
    "seed": 42,
    "B": 32,
    "total_steps": 1000,
    "eval_every": 200,
    "eval_steps": 50,
    "ckpt_every": 1000,
    "base_lr": 0.0003,
    "warmup_steps": 200,
    "min_lr": 0.00003,
    "grad_clip": 1.0,
    "p_train": {"wiki": 0.784, "roam": 0.196, "primer": 0.02},
    "log_every": 50,
}


def write(tmp_path, content):
    path = tmp_path / "c.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refusal(doc, **kwargs):
    with pytest.raises(ValueError, match=r"^here:") as error:
        config_from_dict(doc, where="here", **kwargs)
    return str(error.value)


# --- the dataclasses ---------------------------------------------------------------------------


def test_defaults_are_the_contract():
    assert to_dict(ModelConfig()) == {
        "V": 256,
        "T": 256,
        "C": 256,
        "L": 4,
        "H": 4,
        "d_ff": 1024,
        "dropout": 0.1,
        "rope_theta": 10000.0,
    }
    assert to_dict(TrainConfig()) == {
        **SMOKE,
        "total_steps": 20000,
        "eval_steps": 100,
        "weight_decay": 0.1,
        "optimizer": "adamw",
        "init": "normal",
        "lr_decay": "cosine",
        "val_source": "wiki",
    }
    assert default_p_train() == {"wiki": 0.784, "roam": 0.196, "primer": 0.020}


def test_p_train_is_a_copy_and_never_none():
    given_p = {"wiki": 0.5, "roam": 0.5}
    cfg = TrainConfig(p_train=given_p)
    given_p["wiki"] = 9.0
    assert cfg.p_train == {"wiki": 0.5, "roam": 0.5}
    assert TrainConfig(p_train=None).p_train == default_p_train()
    assert TrainConfig().p_train is not TrainConfig().p_train


@pytest.mark.parametrize("cfg", [ModelConfig(), TrainConfig()])
def test_configs_are_frozen(cfg):
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.T = 8


def test_whole_numbers_given_for_float_fields_become_floats():
    cfg = TrainConfig(grad_clip=1, base_lr=1, min_lr=0, weight_decay=0, p_train={"wiki": 1})
    values = [cfg.grad_clip, cfg.base_lr, cfg.min_lr, cfg.weight_decay, cfg.p_train["wiki"]]
    assert [type(value) for value in values] == [float] * 5
    assert type(ModelConfig(dropout=0).dropout) is float


@given(model_configs(), train_configs())
def test_documents_describe_their_configs_exactly(model_cfg, train_cfg):
    doc = {"model": to_dict(model_cfg), "train": to_dict(train_cfg)}
    assert config_from_dict(json.loads(json.dumps(doc)), where="x") == (model_cfg, train_cfg)
    assert ModelConfig(**doc["model"]) == model_cfg
    assert pickle.loads(pickle.dumps(train_cfg)) == train_cfg


@given(train_configs())
def test_to_dict_shares_nothing(cfg):
    before = to_dict(cfg)
    to_dict(cfg)["p_train"].clear()
    assert to_dict(cfg) == before


WRONG_VALUES = [
    (ModelConfig, "V", 0),
    (ModelConfig, "V", 2**40),
    (ModelConfig, "T", 0),
    (ModelConfig, "T", -1),
    (ModelConfig, "T", 10**9),
    (ModelConfig, "T", True),
    (ModelConfig, "T", 64.0),
    (ModelConfig, "T", "64"),
    (ModelConfig, "T", None),
    (ModelConfig, "C", 10**5000),
    (ModelConfig, "L", 0),
    (ModelConfig, "H", 0),
    (ModelConfig, "d_ff", [1]),
    (ModelConfig, "dropout", 1.0),
    (ModelConfig, "dropout", -0.1),
    (ModelConfig, "dropout", math.nan),
    (ModelConfig, "dropout", False),
    (ModelConfig, "rope_theta", 0),
    (ModelConfig, "rope_theta", math.inf),
    (TrainConfig, "seed", -1),
    (TrainConfig, "seed", 2**63),
    (TrainConfig, "B", 0),
    (TrainConfig, "total_steps", 0),
    (TrainConfig, "total_steps", 1e3),
    (TrainConfig, "eval_every", 0),
    (TrainConfig, "eval_steps", 0),
    (TrainConfig, "log_every", 0),
    (TrainConfig, "ckpt_every", -5),
    (TrainConfig, "warmup_steps", -1),
    (TrainConfig, "base_lr", -1e-4),
    (TrainConfig, "base_lr", math.inf),
    (TrainConfig, "base_lr", 10**400),
    (TrainConfig, "min_lr", math.nan),
    (TrainConfig, "grad_clip", 0.0),
    (TrainConfig, "grad_clip", math.inf),
    (TrainConfig, "weight_decay", -0.1),
    (TrainConfig, "weight_decay", {}),
    (TrainConfig, "optimizer", "moun"),
    (TrainConfig, "optimizer", ""),
    (TrainConfig, "optimizer", "Muon"),
    (TrainConfig, "optimizer", None),
    (TrainConfig, "init", 0.02),
    (TrainConfig, "init", ["normal"]),
    (TrainConfig, "p_train", {}),
    (TrainConfig, "p_train", [0.5, 0.5]),
    (TrainConfig, "p_train", {"wiki": 0.9}),
    (TrainConfig, "p_train", {"wiki": 1.5, "roam": -0.5}),
    (TrainConfig, "p_train", {"wiki": math.nan, "roam": 1.0}),
    (TrainConfig, "p_train", {"wiki": True}),
    (TrainConfig, "p_train", {"wiki": "1"}),
    (TrainConfig, "p_train", {"wiki": 10**5000}),
    (TrainConfig, "p_train", {"wiki": 1 - 2e-6}),
    (TrainConfig, "p_train", {"wiki": 1 + 2e-6 - 0.5, "roam": 0.5}),
    (TrainConfig, "p_train", {"": 1.0}),
    (TrainConfig, "p_train", {1: 1.0}),
]


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    WRONG_VALUES,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_value_is_refused_by_name(cls, name, value):
    with pytest.raises(ValueError, match=rf"^{cls.__name__}: {name}=.* (must|has|sums) ") as error:
        cls(**{name: value})
    assert "; " not in str(error.value)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (ModelConfig, {"H": 6}, "H=6 does not divide C=256"),
        (ModelConfig, {"C": 12, "H": 4}, "odd head width 3"),
        (TrainConfig, {"base_lr": 1e-6}, "min_lr=3e-05 is above base_lr=1e-06"),
        (TrainConfig, {"p_train": {"wiki": 0.5}}, "sums to 0.5, must sum to 1"),
    ],
)
def test_inconsistent_values_are_refused_with_both(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("moun", "did you mean muon?"),
        ("AdamW", "did you mean adamw?"),
        ("sgd", "known: adamw, muon"),
        (3, "known: adamw, muon"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(value, hint):
    message = refusal({"train": {"optimizer": value}})
    assert f"train.optimizer={json.dumps(value)} must be a" in message
    assert message.endswith(f"({hint})")


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (TrainConfig, {"optimizer": "muon", "init": "fan_in"}),
        (ModelConfig, {"T": 1, "C": 2, "H": 1, "L": 1, "d_ff": 1, "V": 1, "dropout": 0}),
        (TrainConfig, {"warmup_steps": 10**6, "total_steps": 1}),
        (TrainConfig, {"min_lr": 0.1, "base_lr": 0.1}),
        (TrainConfig, {"seed": 0}),
        (TrainConfig, {"seed": 2**63 - 1}),
        (TrainConfig, {"p_train": {"wiki": 1 / 3, "roam": 1 / 3, "primer": 1 / 3}}),
        (TrainConfig, {"p_train": {"wiki": 1.0, "roam": 0.0}}),
        (TrainConfig, {"p_train": {"wiki": 1 - 5e-7}}),
    ],
)
def test_legal_edges_are_accepted(cls, values):
    assert to_dict(cls(**values)).items() >= values.items()


def test_a_huge_integer_is_described():
    with pytest.raises(ValueError, match=r"C=\(an integer of 16610 bits\) must be"):
        ModelConfig(C=10**5000)


def test_all_problems_are_in_one_message():
    with pytest.raises(ValueError, match="T=0") as error:
        ModelConfig(T=0, H=6, dropout="x")
    assert all(part in str(error.value) for part in ("T=0", "H=6 does not divide", 'dropout="x"'))


# --- documents ---------------------------------------------------------------------------------


def test_the_shipped_configs_are_those_of_the_specification():
    assert load_json(CONFIGS / "smoke.json") == {"model": {}, "train": SMOKE}
    full = {**SMOKE, "total_steps": 20000, "eval_steps": 100}
    assert load_json(CONFIGS / "train.json") == {"model": {}, "train": full}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_config_is_legal(path):
    model_cfg, train_cfg = load_config_from_json(path)
    assert model_cfg.V == 256
    assert train_cfg.warmup_steps < train_cfg.total_steps


def test_missing_sections_and_keys_take_the_defaults(tmp_path):
    assert load_config_from_json(write(tmp_path, {})) == (ModelConfig(), TrainConfig())
    path = write(tmp_path, {"train": {"B": 2, "p_train": None}})
    assert load_config_from_json(path) == (ModelConfig(), TrainConfig(B=2))


def test_a_key_without_its_section_is_answered_with_the_one_that_is_meant():
    with pytest.raises(ValueError, match=r"must be SECTION\.KEY=VALUE, did you mean train\.B\?"):
        apply_overrides({}, ["B=3"])
    with pytest.raises(ValueError, match=r"did you mean train\.total_steps\?"):
        apply_overrides({}, ["total_step=3"])
    with pytest.raises(ValueError, match=r"such as train\.total_steps=20"):
        apply_overrides({}, ["=3"])


def test_every_unknown_name_is_listed_with_the_nearest(tmp_path):
    doc = {
        "modle": {},
        "model": {"n_head": 4, "dropuot": 0.1},
        "train": {"total_step": 5, "lr": 1, "p_train": {"wikki": 1.0}},
    }
    path = write(tmp_path, doc)
    with pytest.raises(ValueError, match="modle") as error:
        load_config_from_json(path)
    message = str(error.value)
    assert message.startswith(str(path))
    for part in (
        "unknown section modle (did you mean model?)",
        "unknown key model.n_head (",
        "unknown key model.dropuot (did you mean model.dropout?)",
        "unknown key train.total_step (did you mean train.total_steps?)",
        "unknown key train.lr (",
        "unknown source train.p_train.wikki (did you mean train.p_train.wiki?)",
    ):
        assert part in message


def test_names_and_values_are_reported_together():
    message = refusal({"model": {"Tt": 1, "H": 6}, "train": {"B": True, "grad_clip": "1"}})
    for part in ("model.Tt", "model.H=6 does not divide C=256", "train.B=true", 'grad_clip="1"'):
        assert part in message


@pytest.mark.parametrize("doc", [[], None, 3, "x", {"model": []}, {"train": None}])
def test_a_document_of_another_shape_is_refused(doc):
    assert "must be an object" in refusal(doc)


def test_a_config_from_a_file_has_to_suit_bytes_from_files(tmp_path):
    doc = {"model": {"V": 64}, "train": {"p_train": {"mine": 1.0}}}
    message = refusal(doc, from_file=True)
    assert "model.V=64" in message
    assert f"train.p_train.mine (known: {', '.join(SOURCES)})" in message
    with pytest.raises(ValueError, match=r"model\.V=64"):
        load_config_from_json(write(tmp_path, doc))
    model_cfg, train_cfg = config_from_dict(doc, where="a checkpoint")
    assert (model_cfg.V, train_cfg.p_train) == (64, {"mine": 1.0})
    assert load_config_from_json(write(tmp_path, {"model": {"V": 300}}))[0].V == 300


def test_a_flood_of_unknown_keys_is_cut_short():
    message = refusal({"model": {f"key{i}": 1 for i in range(60_000)}})
    assert message.count("unknown key") == 100
    assert message.endswith("and 59900 more")


HOSTILE = {
    "NaN": b'{"train": {"base_lr": NaN}}',
    "Infinity": b'{"train": {"base_lr": Infinity}}',
    "-Infinity": b'{"train": {"base_lr": -Infinity}}',
    "1e400": b'{"train": {"base_lr": 1e400}}',
    "duplicate": b'{"train": {"B": 1, "B": 2}}',
    "duplicate section": b'{"train": {}, "train": {}}',
    "long integer": b'{"train": {"B": ' + b"9" * 5000 + b"}}",
    "deep": b'{"train": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "bad UTF-8": b'{"train": {"\xff": 1}}',
    "BOM": b"\xef\xbb\xbf{}",
    "UTF-16": '{"train": {}}'.encode("utf-16"),
    "UTF-16 without BOM": '{"train": {}}'.encode("utf-16-le"),
    "empty": b"",
    "truncated": b'{"train": {"B": 3',
    "trailing comma": b'{"train": {"B": 3,}}',
    "two values": b"{} {}",
    "comment": b"{} // no",
    "single quotes": b"{'train': {}}",
    "raw control character": b'{"tr\nain": {}}',
    "too large": b'{"train": {"seed": 1}' + b" " * 10_000_000 + b"}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_file_name(name, tmp_path):
    path = write(tmp_path, HOSTILE[name])
    with pytest.raises(ValueError, match=r"c\.json") as error:
        load_config_from_json(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value)) < len(str(path)) + 300


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("NaN", "NaN"),
        ("duplicate", '"B"'),
        ("long integer", "5000 digits"),
        ("bad UTF-8", "0xff at offset 12"),
        ("BOM", "byte order mark"),
        ("truncated", "line 1 column"),
        ("deep", "nested too deeply"),
    ],
)
def test_the_refusal_says_what_is_wrong(name, part, tmp_path):
    with pytest.raises(ValueError, match=part):
        load_config_from_json(write(tmp_path, HOSTILE[name]))


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json: no such file"):
        load_config_from_json(tmp_path / "nowhere.json")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_config_from_json(write(tmp_path, "{}") / "below-a-file.json")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        load_config_from_json(tmp_path)
    with pytest.raises(ValueError, match="not a file name"):
        load_config_from_json("a\0b")


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not enforce RLIMIT_AS")
def test_an_endless_file_is_refused_in_little_memory():
    code = (
        "import resource, sys; from niels_gpt.config import load_config_from_json\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))\n"
        "try: load_config_from_json('/dev/zero')\n"
        "except ValueError as error: sys.exit(str(error))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=CONFIGS.parent, capture_output=True, text=True
    )
    assert result.stderr == "/dev/zero: larger than 1000000 bytes, not a config\n"


values = json_values | st.sampled_from([math.nan, math.inf, True, -1, 0, 10**400, {"wiki": 1.0}])
names = st.text(max_size=12) | st.sampled_from(
    [field.name for cls in (ModelConfig, TrainConfig) for field in dataclasses.fields(cls)]
)
sections = values | st.dictionaries(names, values, max_size=6)
documents = values | st.dictionaries(st.sampled_from(["model", "train"]) | names, sections)


def assert_answered(act):
    """Run `act`: it may give a legal pair of configs or a documented error, nothing else."""
    try:
        model_cfg, train_cfg = act()
    except (ValueError, FileNotFoundError):
        return
    assert ModelConfig(**to_dict(model_cfg)) == model_cfg
    assert TrainConfig(**to_dict(train_cfg)) == train_cfg


@settings(max_examples=300)
@given(documents)
def test_any_document_is_answered(doc):
    assert_answered(lambda: config_from_dict(doc, where="x", from_file=True))


@settings(max_examples=200)
@given(st.data())
def test_any_damage_to_a_config_file_is_answered(tmp_path, data):
    content = bytearray((CONFIGS / "smoke.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, 8))
        content[start : start + length] = data.draw(
            st.binary(max_size=8) | st.sampled_from([b"NaN", b"{", b"true", b"1e999", b"-", b'"'])
        )
    path = write(tmp_path, bytes(content))
    assert_answered(lambda: load_config_from_json(path))


@settings(max_examples=200)
@given(st.text() | st.builds("{}.{}={}".format, st.sampled_from(["model", "train"]), names, values))
def test_any_override_is_answered(override):
    doc = {"train": {"p_train": {"wiki": 1.0}}}
    assert_answered(lambda: config_from_dict(apply_overrides(doc, [override]), where="x"))


# --- overrides ---------------------------------------------------------------------------------


def test_overrides_build_a_new_document():
    doc = {"train": {"B": 4, "p_train": {"wiki": 1.0}}}
    new = apply_overrides(doc, ["train.B=8", "model.C=64", "train.p_train.wiki=0.5", "train.B=2"])
    assert doc == {"train": {"B": 4, "p_train": {"wiki": 1.0}}}
    assert new == {"train": {"B": 2, "p_train": {"wiki": 0.5}}, "model": {"C": 64}}


def test_overrides_of_the_default_probabilities():
    doc = apply_overrides({}, ["train.p_train.roam=0", "train.p_train.wiki=0.98"])
    assert doc["train"]["p_train"] == {"wiki": 0.98, "roam": 0, "primer": 0.02}
    assert apply_overrides({}, ['train.p_train={"wiki":1.0}']) == {
        "train": {"p_train": {"wiki": 1.0}}
    }


@pytest.mark.parametrize("value", ["muon", '"muon"', " muon "])
def test_a_name_may_be_a_bare_word(value):
    doc = apply_overrides({}, [f"train.optimizer={value}"])
    assert doc == {"train": {"optimizer": "muon"}}


@given(st.integers(1, 64), probabilities())
def test_an_override_equals_the_same_value_in_the_file(B, p_train):
    doc = apply_overrides({}, [f"train.B={B}", f"train.p_train={json.dumps(p_train)}"])
    assert config_from_dict(doc, where="x")[1] == TrainConfig(B=B, p_train=p_train)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.total_steps", "SECTION.KEY=VALUE"),
        ("total_steps=3", "SECTION.KEY=VALUE"),
        ("=3", "SECTION.KEY=VALUE"),
        (".=3", "SECTION.KEY=VALUE"),
        ("train.=3", "SECTION.KEY=VALUE"),
        ("train.B.x=3", "SECTION.KEY=VALUE"),
        ("train.B=", "not JSON"),
        ("train.B=three", "not JSON"),
        ("train.B=NaN", "NaN"),
        ("train.optimizer=", "not JSON"),
        ("train.optimzer=muon", "did you mean train.optimizer"),
        ("train.b_lr=3", "did you mean train.base_lr"),
        ("trian.B=3", "did you mean train"),
        ("train.p_train.wikki=1", "did you mean train.p_train.wiki"),
        ('train.p_train={"x":1}', "unknown source train.p_train.x"),
    ],
)
def test_a_wrong_override_is_quoted(override, part):
    with pytest.raises(ValueError, match=part) as error:
        apply_overrides({}, [override])
    assert str(error.value).startswith(f"--set {override}: ")


def test_an_illegal_overridden_value_names_file_and_override(tmp_path):
    path = write(tmp_path, {})
    with pytest.raises(ValueError, match=r"train\.B=0 must be") as error:
        load_config_from_json(path, ["train.B=0"])
    assert str(error.value).startswith(f"{path} with --set train.B=0: ")


def test_overrides_do_not_hide_a_broken_document(tmp_path):
    with pytest.raises(ValueError, match=r"c\.json: train=3 must be an object"):
        load_config_from_json(write(tmp_path, {"train": 3}), ["train.B=1"])
    with pytest.raises(ValueError, match=r"c\.json: train\.p_train=\[1\] must be an object"):
        load_config_from_json(
            write(tmp_path, {"train": {"p_train": [1]}}), ["train.p_train.wiki=1"]
        )


# --- finding -----------------------------------------------------------------------------------


@pytest.fixture
def config_dir(tmp_path, monkeypatch):
    folder = tmp_path / "known"
    folder.mkdir()
    (folder / "mine.json").write_text("{}")
    monkeypatch.setattr(paths, "CONFIG_DIR", folder)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return folder


@pytest.mark.parametrize("name", ["mine", "mine.json"])
def test_a_bare_name_is_found_in_the_config_folder(config_dir, name):
    assert find_config(name) == config_dir / "mine.json"


def test_a_file_as_given_wins_and_a_folder_of_that_name_does_not(config_dir):
    Path("mine").mkdir()
    assert find_config("mine") == config_dir / "mine.json"
    Path("mine.json").write_text("{}")
    assert find_config("mine.json") == Path("mine.json")


def test_the_package_has_configs_where_the_root_has_none(config_dir, tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "shipped.json").write_text("{}")
    monkeypatch.setattr(paths, "PACKAGE_DIR", package)
    assert find_config("shipped") == package / "configs" / "shipped.json"
    with pytest.raises(FileNotFoundError, match="known by name: mine, shipped"):
        find_config("other")


@pytest.mark.parametrize("name", ["sub/mine.json", "none", "", ".", "..", "x" * 5000, "a\0b"])
def test_what_is_not_there_is_not_found(config_dir, name):
    with pytest.raises(FileNotFoundError, match="known by name: "):
        find_config(name)
