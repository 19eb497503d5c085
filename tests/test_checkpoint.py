"""What is refused on the way out and on the way back, resuming, and the output folder."""

import contextlib
import errno
import math
import os
import shutil
import traceback
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt import schema
from niels_gpt.checkpoint import (
    checkpoint_of,
    checkpoint_size,
    load_checkpoint,
    newest_good,
    open_checkpoint,
    parse_payload,
    payload_of,
    save_checkpoint,
    validate_model_config_match,
    write_checkpoint,
)
from niels_gpt.config import ModelConfig, TrainConfig, to_dict
from niels_gpt.eval import Scores
from niels_gpt.files.torchfile import CheckpointError
from niels_gpt.model.gpt import GPT
from niels_gpt.schema import MODEL_FIELDS, check_payload, content_digest, write_payload
from tests.checkpoints import TINY, json_like, random_checkpoint, random_payload, random_state
from tests.strategies import model_configs
from tests.training import same_state


def without(payload, *path):
    """Return a copy of nested dicts and lists without the last key of the path."""
    return _edited(payload, path, lambda parent, key: parent.pop(key))


def replaced(payload, *path, by):
    """Return a copy of nested dicts and lists with another value at the end of the path."""
    return _edited(payload, path, lambda parent, key: parent.__setitem__(key, by))


def _edited(value, path, edit):
    copy = value.copy()
    if len(path) == 1:
        edit(copy, path[0])
    else:
        copy[path[0]] = _edited(value[path[0]], path[1:], edit)
    return copy


def with_digest(payload):
    return {**payload, "digest": content_digest(payload)}


# --- the way out -------------------------------------------------------------------------------

NOT_FINITE = [math.nan, math.inf, -math.inf]
TENSORS = [
    ("model_state", "ln_f.bias"),
    ("model_state", "blocks.0.attn.qkv.weight"),
    ("optimizer_state", "state", 2, "exp_avg"),
    ("optimizer_state", "state", 11, "exp_avg_sq"),
]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("path", TENSORS, ids=lambda path: path[-1])
def test_a_tensor_that_is_not_finite_is_not_saved(tmp_path, path, value):
    file = tmp_path / "latest.pt"
    write_payload([file], random_payload())
    before = file.read_bytes()
    payload = random_payload(step=4)
    tensor = payload
    for key in path:
        tensor = tensor[key]
    tensor.view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=f"{file}.*{path[-1]}.*not finite"):
        write_payload([file], payload)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["latest.pt"]


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_nan_never_becomes_the_best_loss(tmp_path, value):
    payload = replaced(random_payload(), "best_val_loss", by=value)
    with pytest.raises(CheckpointError, match="best_val_loss is"):
        write_payload([tmp_path / "best.pt"], payload)
    torch.save(payload, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="best_val_loss is"):
        load_checkpoint(tmp_path / "best.pt", device="cpu")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Path("data"), r"train_cfg\.deep\.list\[1\] is a PosixPath"),
        ({1, 2}, r"train_cfg\.deep\.list\[1\] is a set"),
        (b"raw", r"train_cfg\.deep\.list\[1\] is a bytes"),
        (print, r"train_cfg\.deep\.list\[1\] is a builtin_function"),
        (torch.float32, r"train_cfg\.deep\.list\[1\] is a dtype"),
        (2**3000, r"an integer of 3001 bits"),
        ({None: 1}, r"has a key of type NoneType"),
        ({1.5: 1}, r"has a key of type float"),
        ({(1, 2): 1}, r"has a key of type tuple"),
        ({2**3000: 1}, r"an integer of 3001 bits"),
    ],
    ids=repr,
)
def test_what_cannot_be_read_back_is_not_written(tmp_path, value, message):
    payload = replaced(random_payload(), "train_cfg", by={"deep": {"list": [0, value]}})
    with pytest.raises(CheckpointError, match=message):
        write_payload([tmp_path / "a.pt"], payload)
    assert os.listdir(tmp_path) == []


def test_a_config_that_is_too_long_to_be_read_back_is_not_written(tmp_path):
    payload = replaced(random_payload(), "train_cfg", by={"notes": "x" * 17_000_000})
    with pytest.raises(CheckpointError, match=r"not saved to .*data\.pkl is larger than"):
        write_payload([tmp_path / "a.pt"], payload)
    assert os.listdir(tmp_path) == []
    payload["train_cfg"]["notes"] = "x" * 16_000_000
    write_payload([tmp_path / "a.pt"], payload)
    load_checkpoint(tmp_path / "a.pt", device="cpu")


def test_tensors_that_are_too_large_to_be_read_back_are_not_even_serialised(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "MAX_TENSOR_BYTES", 1000)
    monkeypatch.delattr(torch, "save")
    with pytest.raises(CheckpointError, match=r"tensors take 2,[0-9]{3} bytes, more than 1,000"):
        write_payload([tmp_path / "a.pt"], random_payload())


def test_a_list_that_holds_itself_is_not_written(tmp_path):
    loop = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="nested deeper"):
        write_payload([tmp_path / "a.pt"], {**random_payload(), "extra": loop})


def test_a_model_of_another_shape_than_its_config_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match=r"tok_emb\.weight has shape \(16, 4\).*\(16, 8\)"):
        save_checkpoint(
            str(tmp_path / "a.pt"),
            model_cfg={**to_dict(TINY), "C": 8},
            train_cfg={},
            model=GPT(TINY),
            optimizer=None,
            step=0,
            best_val_loss=None,
        )


def test_subclasses_of_plain_values_are_written_as_plain_values(tmp_path):
    class Size(int):
        pass

    class Name(str):
        __slots__ = ()

    train_cfg = OrderedDict(B=Size(3), name=Name("x"), lr=torch.tensor(0.5).item())
    write_payload([tmp_path / "a.pt"], {**random_payload(), "train_cfg": train_cfg})
    loaded = load_checkpoint(tmp_path / "a.pt", device="cpu")["train_cfg"]
    assert loaded == {"B": 3, "lr": 0.5, "name": "x"}
    assert {type(value) for value in loaded.values()} == {int, float, str}


def test_views_and_shared_tensors_are_written_compactly(tmp_path):
    payload = random_payload()
    big = torch.arange(1000.0)
    extra = {"view": big[3:5], "column": big.view(10, 100)[:, 7], "wide": big[:1].expand(50)}
    extra["again"] = extra["view"]
    extra["grown"] = torch.zeros(3, requires_grad=True)
    small, whole = tmp_path / "small.pt", tmp_path / "whole.pt"
    write_payload([small], payload)
    write_payload([whole], {**payload, **extra})
    loaded = load_checkpoint(whole, device="cpu")
    for name, tensor in extra.items():
        assert torch.equal(loaded[name], tensor)
    assert whole.stat().st_size < small.stat().st_size + 3000


def test_several_names_hold_the_same_bytes_and_a_failure_spares_the_later_ones(tmp_path):
    first, folder, last = tmp_path / "step_0000003.pt", tmp_path / "best.pt", tmp_path / "latest.pt"
    write_payload([first, last], random_payload())
    assert first.read_bytes() == last.read_bytes()
    old = last.read_bytes()
    folder.mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_payload([first, folder, last], random_payload(seed=5))
    assert caught.value.errno == errno.EISDIR
    assert caught.value.filename == str(folder)
    assert first.read_bytes() != old
    assert last.read_bytes() == old
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "latest.pt", "step_0000003.pt"]


def test_what_an_error_holds_of_a_failed_save_can_be_collected(tmp_path, monkeypatch):
    """CPython 3.12.1 and 3.13.0 crash while they collect a buffer of BytesIO (issue 111049)."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(fd, data):
        raise full

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space left") as caught:
        write_payload([tmp_path / "latest.pt"], random_payload())
    held = [
        value
        for error in (caught.value, caught.value.__context__)  # which names the file, and the first
        for frame, _ in traceback.walk_tb(error.__traceback__)
        for value in frame.f_locals.values()
        if isinstance(value, memoryview)
    ]
    assert held
    assert all(type(view.obj) is bytes for view in held)


# --- the way back ------------------------------------------------------------------------------


def test_a_missing_file_is_filenotfounderror(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "no.pt", tmp_path / "file" / "no.pt", tmp_path / "no" / "no.pt"):
        with pytest.raises(FileNotFoundError, match=r"no\.pt"):
            load_checkpoint(str(path), device="cpu")


GOOD = random_payload()
MOMENT = ("optimizer_state", "state", 0, "exp_avg")
GROUP = ("optimizer_state", "param_groups", 0)
REFUSED = {
    "no model_cfg": (without(GOOD, "model_cfg"), "lacks the keys model_cfg"),
    "no step": (without(GOOD, "step"), "lacks the keys step"),
    "a list": ([GOOD], "contains a list, not a dict"),
    "step true": (replaced(GOOD, "step", by=True), "step is a bool"),
    "step negative": (replaced(GOOD, "step", by=-1), "step is -1"),
    "step huge": (replaced(GOOD, "step", by=10**13), "step is 10"),
    "step a tensor": (replaced(GOOD, "step", by=torch.tensor(3)), "step is a Tensor"),
    "best a string": (replaced(GOOD, "best_val_loss", by="1.5"), "best_val_loss is a str"),
    "config not a dict": (replaced(GOOD, "train_cfg", by=[1]), "train_cfg is a list"),
    "digest not a string": (replaced(GOOD, "digest", by=1), "digest is a int"),
    "unknown field": (replaced(GOOD, "model_cfg", "W", by=3), "model_cfg has the unknown key W"),
    "illegal field": (replaced(GOOD, "model_cfg", "H", by=3), "model_cfg: .*H=3"),
    "field of a wrong type": (replaced(GOOD, "model_cfg", "C", by="4"), "model_cfg: .*C="),
    "more blocks than tensors": (replaced(GOOD, "model_cfg", "L", by=1000), r"lacks blocks\.1"),
    "one block more": (replaced(GOOD, "model_cfg", "L", by=2), r"lacks blocks\.1"),
    "a tensor less": (without(GOOD, "model_state", "ln_f.bias"), r"lacks ln_f\.bias"),
    "no head": (without(GOOD, "model_state", "lm_head.weight"), r"lacks lm_head\.weight"),
    "a tensor more": (
        replaced(GOOD, "model_state", "pos_emb", by=torch.zeros(2)),
        "unknown tensor pos_emb",
    ),
    "not a tensor": (replaced(GOOD, "model_state", "ln_f.bias", by=[0.0] * 4), "is a list"),
    "another dtype": (
        replaced(GOOD, "model_state", "ln_f.bias", by=torch.zeros(4, dtype=torch.float64)),
        r"ln_f\.bias is torch\.float64",
    ),
    "another shape": (
        replaced(GOOD, "model_state", "ln_f.bias", by=torch.zeros(2, 2)),
        r"ln_f\.bias has shape \(2, 2\)",
    ),
    "untied": (
        replaced(GOOD, "model_state", "lm_head.weight", by=torch.zeros(16, 4)),
        "differs from tok_emb",
    ),
    "nan": (
        replaced(GOOD, "model_state", "ln_f.bias", by=torch.full((4,), math.nan)),
        r"ln_f\.bias has a value that is not finite",
    ),
    "requires grad": (
        replaced(GOOD, "model_state", "ln_f.bias", by=torch.zeros(4, requires_grad=True)),
        "ln_f.bias is not plain data",
    ),
    "stride 0": (
        replaced(GOOD, "model_state", "ln_f.bias", by=torch.zeros(1).expand(4)),
        "does not fill its storage of 4 bytes",
    ),
    "transposed": (
        replaced(GOOD, "model_state", "tok_emb.weight", by=torch.zeros(4, 16).T),
        "does not fill its storage",
    ),
    "a larger storage": (
        replaced(GOOD, "model_state", "ln_f.bias", by=torch.zeros(100)[:4]),
        "does not fill its storage of 400 bytes",
    ),
    "a shared storage": (
        replaced(GOOD, "model_state", "ln_f.bias", by=GOOD["model_state"]["ln_f.weight"]),
        r"ln_f\.bias shares the storage of model_state\.ln_f\.weight",
    ),
    "a moment shared": (
        replaced(GOOD, *MOMENT, by=GOOD["optimizer_state"]["state"][0]["exp_avg_sq"]),
        "shares the storage",
    ),
    "a moment of another shape": (
        replaced(GOOD, *MOMENT, by=torch.zeros(3)),
        r"state\.0\.exp_avg has shape \(3,\)",
    ),
    "a moment that is no tensor": (replaced(GOOD, *MOMENT, by="x"), "exp_avg is a str"),
    "a moment that is not finite": (
        replaced(GOOD, *MOMENT, by=torch.full((16, 4), math.inf)),
        "exp_avg has a value that is not finite",
    ),
    "a step that is no number": (
        replaced(GOOD, "optimizer_state", "state", 0, "step", by=torch.zeros(2)),
        r"state\.0\.step is not a number",
    ),
    "no groups": (without(GOOD, "optimizer_state", "param_groups"), "not the state_dict"),
    "a group without numbers": (without(GOOD, *GROUP, "params"), "lists no parameters"),
    "a parameter twice": (
        replaced(GOOD, *GROUP, "params", by=[0, 0]),
        "lists a parameter twice",
    ),
    "names that are no list": (replaced(GOOD, *GROUP, "param_names", by=3), "not a list of names"),
    "moments of nobody": (
        replaced(GOOD, "optimizer_state", "state", 99, by={}),
        r"state\.99 belongs to no parameter",
    ),
    "a tensor in a config": (
        replaced(GOOD, "train_cfg", "lr", by=torch.tensor(0.1)),
        r"train_cfg\.lr is a tensor, not a plain value",
    ),
    "a tensor in the environment": (
        {**GOOD, "environment": {"threads": [0, torch.tensor(1)]}},
        r"environment\.threads\[1\] is a tensor, not a plain value",
    ),
    "a loss that is no float": (
        replaced(GOOD, "best_val_loss", by=2**1990),
        "best_val_loss is an integer of 1991 bits",
    ),
    "a number of a parameter that is slow to hash": (
        replaced(GOOD, *GROUP, "params", by=[2**61]),
        "lists no parameters",
    ),
    "deep nesting": (
        replaced(GOOD, "train_cfg", "deep", by=eval("[" * 40 + "]" * 40)),
        "nested deeper",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_content_that_is_not_right_is_refused_by_name(tmp_path, case):
    payload, message = REFUSED[case]
    file = tmp_path / "bad.pt"
    torch.save(payload, file)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(file, device="cpu")
    assert str(caught.value).startswith(f"{file}: ")


WEIGHTS = GPT(TINY).state_dict()
MODULE = torch.nn.DataParallel(torch.nn.ModuleDict({"gpt": GPT(TINY)}))
MOMENTS = torch.optim.AdamW(GPT(TINY).parameters()).state_dict()
FOREIGN = {
    "nanoGPT": (
        {
            "model": {"transformer.wte.weight": WEIGHTS["tok_emb.weight"]},
            "optimizer": MOMENTS,
            "model_args": {"n_layer": 1, "bias": False},
            "iter_num": 3,
            "best_val_loss": torch.tensor(1.5),
            "config": {"out_dir": "out"},
        },
        "is a nanoGPT checkpoint: a different network",
    ),
    "a bare state_dict": (
        WEIGHTS,
        r"is a bare state_dict \(tok_emb\.weight, .*\), not a dict with the keys model_cfg",
    ),
    "an optimizer": (MOMENTS, "is the state_dict of an optimizer, not a dict with the keys"),
    "another trainer's": (
        {"state_dict": WEIGHTS, "epoch": 3},
        "lacks the keys model_cfg, train_cfg, model_state, step; it contains state_dict, epoch",
    ),
    "a compiled module": (
        {**GOOD, "model_state": {f"_orig_mod.{name}": t for name, t in WEIGHTS.items()}},
        r"saved from a wrapper of the model \(its names begin with _orig_mod\.\); save the state_d",
    ),
    "wrapped twice": (
        {**GOOD, "model_state": MODULE.state_dict()},
        r"its names begin with module\.gpt\.",
    ),
    "views of other storages": (
        {**GOOD, "model_state": {n: torch.zeros(9)[:1] for n in ("wte", "wpe")}},
        "lacks blocks",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_the_first_message_is_what_the_file_is(tmp_path, case):
    """Not what of it fails first, such as a storage that two tensors share."""
    payload, message = FOREIGN[case]
    file = tmp_path / "foreign.pt"
    torch.save(payload, file)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(file, device="cpu")


CHANGES = {
    "a value": lambda p: replaced(p, "step", by=4),
    "a type": lambda p: replaced(p, "train_cfg", "B", by=32.0),
    "a list for a tuple": lambda p: replaced(p, *GROUP, "betas", by=[0.9, 0.95]),
    "a key": lambda p: {**p, "more": None},
    "a sign of zero": lambda p: replaced(p, "train_cfg", "grad_clip", by=-0.0),
    "a bit of a tensor": lambda p: replaced(p, *MOMENT, by=_one_bit_off(p)),
    "a dtype": lambda p: replaced(p, "t", by=p["t"].view(torch.int32)),
    "a shape": lambda p: replaced(p, "t", by=p["t"].reshape(2, 2)),
    "true for 1": lambda p: replaced(p, "one", by=True),
}


def _one_bit_off(payload):
    moment = payload["optimizer_state"]["state"][0]["exp_avg"].clone()
    moment.view(torch.int32)[0, 0] ^= 1
    return moment


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_covers_every_key_type_shape_and_bit(tmp_path, change):
    payload = {**random_payload(), "t": torch.zeros(4), "one": 1}
    payload = replaced(payload, "train_cfg", "grad_clip", by=0.0)
    changed = CHANGES[change](payload)
    check_payload(changed)  # nothing but the digest stands against it
    assert content_digest(changed) != content_digest(payload)
    torch.save({**changed, "digest": content_digest(payload)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="does not match its digest"):
        load_checkpoint(tmp_path / "a.pt", device="cpu")


@given(data=st.data())
def test_a_mutated_payload_loads_or_is_refused_and_nothing_else(tmp_path, data):
    """Put any plain value, or a tensor of another place, anywhere in the payload."""
    paths = list(_paths(GOOD, ()))
    target = data.draw(st.sampled_from(paths))
    tensors = [value for path in paths if isinstance(value := _at(GOOD, path), torch.Tensor)]
    mutated = replaced(GOOD, *target, by=data.draw(json_like | st.sampled_from(tensors)))
    torch.save(mutated, tmp_path / "a.pt")
    try:
        loaded = load_checkpoint(tmp_path / "a.pt", device="cpu")
        opened = open_checkpoint(tmp_path / "a.pt")
        assert isinstance(opened.messages, list)
        opened.state_under(TINY, TrainConfig())
    except ValueError:
        return
    assert content_digest(loaded) == content_digest({"best_val_loss": None, **mutated})


def _paths(value, path):
    if path:
        yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from _paths(item, (*path, key))


def _at(value, path):
    for key in path:
        value = value[key]
    return value


def test_the_error_names_a_good_checkpoint_to_use_instead(tmp_path):
    write_payload([tmp_path / "step_0000002.pt"], random_payload(step=2))
    write_payload([tmp_path / "step_0000001.pt"], random_payload(step=1))
    (tmp_path / "latest.pt").write_bytes(b"\0" * 500)
    with pytest.raises(CheckpointError, match=r"latest\.pt: .*good checkpoint .* step_0000002\.pt"):
        load_checkpoint(tmp_path / "latest.pt", device="cpu")


# --- resuming ----------------------------------------------------------------------------------


@given(a=model_configs(), b=model_configs())
def test_a_model_diff_has_a_line_per_differing_field(a, b):
    differing = [name for name in MODEL_FIELDS if getattr(a, name) != getattr(b, name)]
    if not differing:
        validate_model_config_match(to_dict(a), b)
        return
    with pytest.raises(ValueError, match="differs from the config") as caught:
        validate_model_config_match(to_dict(a), b)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == differing
    for line, name in zip(lines, differing, strict=True):
        assert str(getattr(a, name)) in line
        assert str(getattr(b, name)) in line


def test_a_field_that_the_checkpoint_lacks_is_a_difference():
    with pytest.raises(ValueError, match=r"rope_theta: checkpoint .*missing"):
        validate_model_config_match(without(to_dict(TINY), "rope_theta"), to_dict(TINY))


def test_a_resume_into_another_shape_shows_the_diff():
    with pytest.raises(ValueError, match="C: checkpoint 4, config 8"):
        parse_payload(GOOD).state_under(ModelConfig(**{**to_dict(TINY), "C": 8}), TrainConfig())


def test_a_resume_without_moments_starts_them_at_zero_and_says_so():
    checkpoint = parse_payload(replaced(with_digest(GOOD), "optimizer_state", by=None))
    state = checkpoint.state_under(TINY, TrainConfig(B=5))
    assert state.step == 3
    assert state.train_cfg.B == 5
    for tree in state.opt_state:
        assert all(not tree[name].any() for name in state.params)
    assert [message for message in checkpoint.messages if "from zero" in message]


def test_notes_are_silent_on_an_own_checkpoint_and_name_what_a_foreign_one_lacks():
    assert parse_payload(with_digest(GOOD)).messages == []
    assert "another program" in parse_payload(GOOD).messages[0]
    other = with_digest(replaced(GOOD, "step", by=7))
    assert "step is 7, but its optimizer counted 3 updates" in parse_payload(other).messages[0]


def plain_payload(optimizer, model):
    return check_payload(
        {
            "model_cfg": to_dict(TINY),
            "train_cfg": {},
            "model_state": model.state_dict(),
            "optimizer_state": optimizer.state_dict(),
            "step": 1,
        }
    )


def stepped(make):
    model = GPT(TINY)
    optimizer = make(model)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, i + 1.0)
    optimizer.step()
    return model, optimizer


def test_moments_of_another_optimizer_are_refused():
    model, optimizer = stepped(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
    with pytest.raises(
        CheckpointError, match=r"from another optimizer: it has \['momentum_buffer'\] for tok_emb"
    ):
        parse_payload(plain_payload(optimizer, model)).state_under(TINY, TrainConfig())


def test_the_state_of_another_known_optimizer_is_refused_with_both_names():
    checkpoint = checkpoint_of(random_state(optimizer="muon"))
    with pytest.raises(CheckpointError, match=r"is that of muon, but train\.optimizer is adamw"):
        checkpoint.state_under(TINY, TrainConfig())
    assert checkpoint.state.train_cfg.optimizer == "muon"


def test_a_file_of_a_version_without_the_names_is_of_their_defaults():
    state = random_state()
    payload = payload_of(checkpoint_of(state))
    for key in ("optimizer", "init"):
        del payload["train_cfg"][key]
    assert same_state(parse_payload(payload).state, state)


def test_the_source_that_judges_is_kept_unless_it_is_the_one_that_files_without_it_mean():
    """So that the bytes of a run that is judged by wiki are as they were."""
    assert "val_source" not in payload_of(checkpoint_of(random_state()))["train_cfg"]
    own = checkpoint_of(random_state(val_source="text"))
    assert payload_of(own)["train_cfg"]["val_source"] == own.val_source == "text"
    assert parse_payload(payload_of(own)).state.train_cfg.val_source == "text"
    assert checkpoint_of(random_state()).state.train_cfg.val_source == "wiki"


def test_a_file_that_leaves_out_defaults_is_resumed_under_them():
    state = random_state(ModelConfig(C=8, L=1, H=2, d_ff=8))
    payload = payload_of(checkpoint_of(state))
    payload["model_cfg"] = {"C": 8, "L": 1, "H": 2, "d_ff": 8}
    opened = parse_payload(payload)
    assert same_state(opened.state_under(state.model_cfg, state.train_cfg), state)


def test_an_optimizer_that_keeps_nothing_is_said_to_start_from_zero():
    model, optimizer = stepped(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    opened = parse_payload(plain_payload(optimizer, model))
    assert "the checkpoint has no optimizer state: it starts from zero" in opened.messages
    assert not any(t.any() for t in opened.state_under(TINY, TrainConfig()).opt_state[0].values())


def test_one_group_of_some_parameters_is_refused():
    model, optimizer = stepped(
        lambda m: torch.optim.AdamW([p for p in m.parameters() if p.ndim > 1])
    )
    with pytest.raises(CheckpointError, match="does not cover the model's parameters"):
        parse_payload(plain_payload(optimizer, model)).state_under(TINY, TrainConfig())


@pytest.mark.parametrize("named", [False, True])
def test_several_parameter_groups_need_names(named):
    def make(model):
        pairs = list(model.named_parameters())
        decayed = [(n, p) if named else p for n, p in pairs if p.ndim > 1]
        others = [(n, p) if named else p for n, p in pairs if p.ndim == 1]
        return torch.optim.AdamW([{"params": others}, {"params": decayed}])

    model, optimizer = stepped(make)
    payload = plain_payload(optimizer, model)
    if not named:
        with pytest.raises(CheckpointError, match="several groups without names"):
            parse_payload(payload).state_under(TINY, TrainConfig())
        return
    state = parse_payload(payload).state_under(TINY, TrainConfig())
    for name, p in model.named_parameters():
        assert torch.equal(state.opt_state.exp_avg[name], optimizer.state[p]["exp_avg"])
        assert torch.equal(state.opt_state.exp_avg_sq[name], optimizer.state[p]["exp_avg_sq"])


# --- the output folder -------------------------------------------------------------------------


def put(folder, **steps):
    """Write a good checkpoint of each step, or a damaged one for None."""
    for name, step in steps.items():
        path = folder / f"{name}.pt"
        if step is None:
            path.write_bytes(b"damaged")
        else:
            write_payload([path], random_payload(step=step))


@pytest.mark.parametrize(
    ("files", "found", "skipped"),
    [
        ({}, None, []),
        ({"latest": 5}, "latest.pt", []),
        ({"latest": 5, "best": 5, "step_0000005": 5}, "latest.pt", []),
        ({"latest": None, "best": 2, "step_0000005": 5}, "step_0000005.pt", ["latest.pt"]),
        ({"latest": 4, "step_0000005": 5}, "step_0000005.pt", []),
        ({"latest": None, "best": 6, "step_0000005": 5}, "best.pt", ["latest.pt"]),
        (
            {"latest": None, "step_0000009": None, "step_0000005": 5, "step_0000003": 3},
            "step_0000005.pt",
            ["latest.pt", "step_0000009.pt"],
        ),
        ({"latest": None, "best": None}, None, ["latest.pt", "best.pt"]),
        ({"mine": 9, "step_9": 9, "latest": 2}, "latest.pt", []),
        ({"latest": 5, "step_0000003": None}, "latest.pt", []),
        ({"step_10000000": 10000000, "step_9999999": 9999999}, "step_10000000.pt", []),
    ],
)
def test_newest_good(tmp_path, files, found, skipped):
    put(tmp_path, **files)
    checkpoint, reasons = newest_good(tmp_path)
    assert (checkpoint and checkpoint.path) == (found and tmp_path / found)
    assert [skipped_path.name for skipped_path, _ in reasons] == skipped
    assert all(reason for _, reason in reasons)


def test_the_step_that_counts_is_the_one_inside_the_file(tmp_path):
    put(tmp_path, latest=5, step_0000009=9)
    shutil.copy(tmp_path / "latest.pt", tmp_path / "step_0000009.pt")
    assert newest_good(tmp_path)[0].path == tmp_path / "latest.pt"


# --- the keys beside pr-06's six -----------------------------------------------------------------

STREAM = {"origin": "notes", "bytes": 5, "sha256": "0" * 64}
SOURCES = {"train": {"wiki": STREAM}, "val": {}}
ENVIRONMENT = {"torch": "2", "threads": 3, "compile": False}

optional_floats = st.none() | st.floats(allow_nan=False, allow_infinity=False)
optional_steps = st.none() | st.integers(0, 10**9)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(
    *(optional_floats, optional_steps, optional_floats, optional_steps),
    *(st.sampled_from([None, SOURCES]), st.sampled_from([{}, ENVIRONMENT])),
)
def test_what_was_kept_comes_back(tmp_path, best, best_step, val, val_step, sources, environment):
    scores = Scores(best, best_step, val, val_step)
    checkpoint = checkpoint_of(random_state(), scores, sources, environment)
    digest = write_checkpoint([tmp_path / "a.pt"], checkpoint)
    opened = open_checkpoint(tmp_path / "a.pt")
    assert opened.scores == scores
    assert opened.sources == sources
    assert opened.environment == environment
    assert (opened.digest, opened.path) == (digest, tmp_path / "a.pt")
    assert write_checkpoint([tmp_path / "b.pt"], opened) == digest
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_a_plain_loops_checkpoint_is_a_value_too(tmp_path):
    """pr-06's keys through torch.save: another optimizer, and a train_cfg of its own."""
    model, optimizer = stepped(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
    payload = {**plain_payload(optimizer, model), "train_cfg": {"my_lr": 0.1}}
    torch.save(payload, tmp_path / "plain.pt")
    opened = open_checkpoint(tmp_path / "plain.pt")
    assert (opened.cfg, opened.train_cfg, opened.step) == (TINY, {"my_lr": 0.1}, 1)
    assert (opened.scores, opened.sources, opened.environment) == (Scores(), None, {})
    assert opened.digest is None
    assert "another program" in opened.messages[0]
    for name, p in model.named_parameters():
        assert torch.equal(opened.params[name], p)
    with pytest.raises(ValueError, match=r"configs in .*plain\.pt"):
        _ = opened.state
    assert payload_of(opened).keys() == payload.keys()


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ({"scores": "high"}, "scores"),
        ({"scores": {"val_step": "x"}}, "scores.val_step"),
        ({"sources": [1]}, "sources"),
        ({"sources": {"train": 1}}, "train"),
        ({"sources": {"val": {"wiki": None}}}, "wiki"),
        ({"sources": {"val": {"wiki": {**STREAM, "bytes": "5"}}}}, "val.wiki.bytes"),
        ({"environment": 1}, "environment"),
        ({"environment": {"threads": 0}}, "threads"),
        ({"environment": {"threads": "all"}}, "threads"),
    ],
)
def test_something_else_under_these_names_is_refused_by_name(tmp_path, extra, where):
    write_payload([tmp_path / "a.pt"], {**GOOD, **extra})
    with pytest.raises(CheckpointError, match=where) as caught:
        open_checkpoint(tmp_path / "a.pt")
    assert str(caught.value).startswith(f"{tmp_path / 'a.pt'}: ")
    assert newest_good(tmp_path)[0] is None
    assert load_checkpoint(tmp_path / "a.pt", device="cpu")["step"] == 3  # a dict, as it is


@given(plain, st.sampled_from(["scores", "sources", "environment"]))
def test_nothing_plain_ends_in_another_error(value, key):
    with contextlib.suppress(CheckpointError):
        parse_payload({**GOOD, key: value})


def test_the_size_of_a_file_is_known_before_it_is_written(tmp_path):
    write_checkpoint([tmp_path / "a.pt"], random_checkpoint())
    size = (tmp_path / "a.pt").stat().st_size
    assert checkpoint_size(random_checkpoint()) == pytest.approx(size, rel=0.02)
