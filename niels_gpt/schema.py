"""What a checkpoint file may hold: canonical form, digest, validation, reading and writing.

A payload is the dict of a checkpoint (its keys are listed in `niels_gpt.checkpoint`). The same
checks apply on writing and on reading, so every file that is written loads.
"""

import hashlib
import io
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niels_gpt.config import ModelConfig
from niels_gpt.files import durable
from niels_gpt.files.torchfile import (
    MAX_TENSOR_BYTES,
    CheckpointError,
    check_torch_file,
    key_problem,
    raw_bytes,
    read_torch_file,
    show,
)
from niels_gpt.model.gpt import skeleton
from niels_gpt.optim import state_fields

Payload = dict[str, Any]
Place = tuple[Any, Any] | None  # in a payload: the place above, and the key, or [index], below it
Tensors = list[tuple[Place, Tensor]]

KEYS = ("model_cfg", "train_cfg", "model_state", "optimizer_state", "step", "best_val_loss")
OPTIONAL = ("optimizer_state", "best_val_loss")
MODEL_FIELDS = tuple(field.name for field in fields(ModelConfig))
TIED = ("model_state.tok_emb.weight", "model_state.lm_head.weight")

PLAIN = (  # as JSON: no tensors
    *("model_cfg", "train_cfg", "scores", "sources", "environment", "ancestors"),
)

MAX_VALUES = 200_000  # 1024 blocks take 60 thousand
MAX_DEPTH = 32
MAX_NAME = 200  # of a place in a message
MAX_INT_BITS = 1000  # each of them is a float as well
MAX_STEP = 10**12


# --- canonical form ----------------------------------------------------------------------------


def canonical_payload(payload: Mapping[str, Any]) -> Payload:
    """Return the content of the file: compact CPU tensors and plain values in a fixed order."""
    first = [key for key in KEYS if key in payload]
    seen: set[int] = set()
    clean: Payload = {
        sys.intern(key): _canonical(payload[key], (None, key), seen)
        for key in first + sorted(payload.keys() - {*KEYS})
    }
    given = payload.get("model_state")
    if isinstance(given, Mapping):  # in the model's order, the tied weight once
        tensors = clean["model_state"]
        clean["model_state"] = {sys.intern(name): tensors[name] for name in given}
        if _same(given.get("tok_emb.weight"), given.get("lm_head.weight")):
            clean["model_state"]["lm_head.weight"] = tensors["tok_emb.weight"]
    return clean


def _canonical(value: object, where: Place, seen: set[int], depth: int = 0) -> Any:
    """Copy as needed so that equal content pickles to equal bytes.

    Strings are interned because pickle deduplicates repeated objects, not repeated values.
    """
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{_name(where)} is nested deeper than {MAX_DEPTH} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Tensor):
        return _compact(value, seen)
    if isinstance(value, str):
        return sys.intern(str(value))
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {
            sys.intern(key) if isinstance(key, str) else key: _canonical(
                value[key], (where, key), seen, depth + 1
            )
            for key in _sorted_keys(value, where)
        }
    if isinstance(value, list | tuple):
        items = [_canonical(v, (where, [i]), seen, depth + 1) for i, v in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    what = type(value).__name__
    raise CheckpointError(f"{_name(where)} is a {what}, which a checkpoint cannot store")


def _compact(tensor: Tensor, seen: set[int]) -> Tensor:
    """Return a contiguous CPU tensor that fills its own storage."""
    t = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    storage = t.untyped_storage()
    if storage.nbytes() != t.nbytes or storage.data_ptr() in seen:
        t = t.clone()
        storage = t.untyped_storage()
    seen.add(storage.data_ptr())
    return t


def _same(a: object, b: object) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and (a is b or torch.equal(a, b))


def _sorted_keys(value: Mapping[Any, Any], where: Place) -> list[str | int]:
    for key in value:
        if problem := key_problem(key):
            raise CheckpointError(f"{_name(where)} {problem}")
    return sorted(value, key=lambda key: (type(key).__name__, key))


# --- digest ------------------------------------------------------------------------------------


def content_digest(payload: Mapping[str, Any]) -> str:
    """Return the SHA-256 of every key, type, dtype, shape and byte of a payload but its digest."""
    sha = hashlib.sha256()
    for chunk in _encoding({k: v for k, v in payload.items() if k != "digest"}):
        sha.update(chunk)
    return sha.hexdigest()


def _encoding(value: Any) -> Iterator[bytes | memoryview]:
    kind = type(value).__name__
    if isinstance(value, Tensor):
        on_cpu = value.cpu().contiguous()
        yield f"tensor {value.dtype} {tuple(value.shape)};".encode()
        yield raw_bytes(on_cpu)
    elif isinstance(value, Mapping):
        yield f"dict {len(value)};".encode()
        for key in _sorted_keys(value, None):
            yield from _encoding(key)
            yield from _encoding(value[key])
    elif isinstance(value, list | tuple):
        yield f"{kind} {len(value)};".encode()
        for item in value:
            yield from _encoding(item)
    elif isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        yield f"str {len(text)};".encode() + text
    else:
        yield f"{kind} {value!r};".encode()


# --- checks ------------------------------------------------------------------------------------


def check_payload(payload: object) -> Payload:
    """Return a copy with plain dicts and the same tensors, or raise naming the first problem.

    The order makes the first message the true cause: keys, types, names, storages, shapes, values.
    """
    if not isinstance(payload, dict):
        raise CheckpointError(f"contains a {type(payload).__name__}, not a dict")
    _check_kind(payload)
    tensors: Tensors = []
    clean = _check_value(payload, None, tensors, iter(range(MAX_VALUES)))
    clean = {**dict.fromkeys(OPTIONAL), **clean}
    for key, kinds in {
        "model_cfg": (dict,),
        "train_cfg": (dict,),
        "model_state": (dict,),
        "optimizer_state": (dict, type(None)),
        "step": (int,),
        "best_val_loss": (float, int, type(None)),
        "digest": (str,),
    }.items():
        if key in clean and type(clean[key]) not in kinds:
            raise CheckpointError(f"{key} is a {type(clean[key]).__name__}")
    if not 0 <= clean["step"] <= MAX_STEP:
        raise CheckpointError(f"step is {clean['step']}")
    best = clean["best_val_loss"]
    if best is not None and (math.isnan(best) or best == -math.inf):
        raise CheckpointError(f"best_val_loss is {best}")
    shapes = parameter_shapes(_model_config(clean["model_cfg"]))
    _check_names(clean["model_state"], shapes)
    _check_storages(tensors)
    _check_model_state(clean["model_state"], shapes)
    if clean["optimizer_state"] is not None:
        _check_optimizer_state(clean["optimizer_state"], shapes)
    _check_finite(tensors)
    return clean


def _check_kind(payload: Mapping[Any, Any]) -> None:
    """Refuse a dict that is not a checkpoint; say what it is where that can be told."""
    missing = [key for key in KEYS if key not in {*OPTIONAL, *payload}]
    if not missing:
        return
    keys = f"a dict with the keys {', '.join(KEYS)}"
    if {"model", "model_args", "iter_num"} <= payload.keys():
        what = "is a nanoGPT checkpoint: a different network, which cannot be loaded"
    elif payload and all(isinstance(value, Tensor) for value in payload.values()):
        what = f"is a bare state_dict ({show(next(iter(payload)))}, ...), not {keys}"
    elif {"state", "param_groups"} <= payload.keys():
        what = f"is the state_dict of an optimizer, not {keys}"
    else:
        found = ", ".join(map(show, list(payload)[:10]))
        what = f"lacks the keys {', '.join(missing)}; it contains {found or 'nothing'}"
    raise CheckpointError(what)


def _check_value(
    value: object, where: Place, tensors: Tensors, budget: Iterator[int], depth: int = 0
) -> Any:
    """Copy plain values, within bounds, and collect the tensors with their places."""
    if next(budget, None) is None:
        raise CheckpointError(f"contains more than {MAX_VALUES} values")
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{_name(where)} is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Tensor):
        tensors.append((where, value))
        return value
    if isinstance(value, dict):
        _sorted_keys(value, where)
        return {
            key: _check_value(item, (where, key), tensors, budget, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = [
            _check_value(item, (where, [i]), tensors, budget, depth + 1)
            for i, item in enumerate(value)
        ]
        return items if isinstance(value, list) else tuple(items)
    if type(value) is int and value.bit_length() > MAX_INT_BITS:
        raise CheckpointError(f"{_name(where)} is an integer of {value.bit_length()} bits")
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise CheckpointError(f"{_name(where)} is a {type(value).__name__}")


def _name(where: Place) -> str:
    """Write a place as model_state.tok_emb.weight or train_cfg.list[3], cut to its end if long."""
    parts: list[str] = []
    while where is not None:
        where, key = where
        parts.append(f"[{key[0]}]" if isinstance(key, list) else f".{show(key)}")
    name = "".join(reversed(parts)).removeprefix(".") or "the dict"
    return name if len(name) <= MAX_NAME else f"...{name[-MAX_NAME:]}"


def _section(where: Place) -> object:
    """Return the key of the payload below which a place is."""
    section = None
    while where is not None:
        where, section = where
    return section


def _check_storages(tensors: Tensors) -> None:
    """Each tensor fills a storage, of its own but for the tied pair; none is among plain values."""
    owners: dict[int, Place] = {}
    for where, t in tensors:
        if _section(where) in PLAIN:
            raise CheckpointError(f"{_name(where)} is a tensor, not a plain value")
        _check_plain(t, where)
        owner = owners.setdefault(t.untyped_storage().data_ptr(), where) if t.nbytes else where
        if owner is not where and {_name(owner), _name(where)} != set(TIED):
            raise CheckpointError(f"{_name(where)} shares the storage of {_name(owner)}")
    size = sum({t.untyped_storage().data_ptr(): t.nbytes for _, t in tensors}.values())
    if size > MAX_TENSOR_BYTES:
        raise CheckpointError(f"its tensors take {size:,} bytes, more than {MAX_TENSOR_BYTES:,}")


def _check_plain(t: Tensor, where: Place) -> None:
    if type(t) is not Tensor or t.layout is not torch.strided or t.device.type != "cpu":
        raise CheckpointError(f"{_name(where)} is not a plain tensor")
    if t.requires_grad or t.is_conj() or t.is_neg() or t.is_quantized:
        raise CheckpointError(f"{_name(where)} is not plain data")
    storage = t.untyped_storage()
    if not t.is_contiguous() or t.storage_offset() != 0 or storage.nbytes() != t.nbytes:
        raise CheckpointError(
            f"{_name(where)} of shape {tuple(t.shape)} and strides {t.stride()} does not fill"
            f" its storage of {storage.nbytes()} bytes"
        )


def _model_config(model_cfg: Mapping[str, Any]) -> ModelConfig:
    unknown = sorted(set(model_cfg) - set(MODEL_FIELDS), key=str)
    if unknown:
        raise CheckpointError(f"model_cfg has the unknown key {show(unknown[0])}")
    try:
        return ModelConfig(**model_cfg)
    except ValueError as error:
        raise CheckpointError(f"model_cfg: {error}".replace("\n ", "")) from None


def _check_names(model_state: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """Check the names of the tensors against the model's config."""
    expected = shapes.keys() | {"lm_head.weight"}
    for name in sorted(expected ^ model_state.keys(), key=str):
        if prefix := _common_prefix(model_state):
            raise CheckpointError(
                f"model_state was saved from a wrapper of the model (its names begin with"
                f" {show(prefix)}); save the state_dict of the model inside it"
            )
        what = "lacks" if name in expected else "has the unknown tensor"
        raise CheckpointError(f"model_state {what} {show(name)}")


def _common_prefix(model_state: Mapping[str, Any]) -> str:
    """Return what `torch.compile`, `DataParallel` and other wrappers put before every name."""
    inner = "tok_emb.weight"
    names = [str(name) for name in model_state]
    prefix = next((name.removesuffix(inner) for name in names if name.endswith(inner)), "")
    return prefix if all(name.startswith(prefix) for name in names) else ""


def _check_model_state(model_state: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check dtypes and shapes against the model's config, and make the tied pair one tensor."""
    for name, shape in {**shapes, "lm_head.weight": shapes["tok_emb.weight"]}.items():
        _check_float_tensor(model_state[name], f"model_state.{name}", shape)
    if not _same(model_state["tok_emb.weight"], model_state["lm_head.weight"]):
        raise CheckpointError("model_state.lm_head.weight differs from tok_emb.weight")
    model_state["lm_head.weight"] = model_state["tok_emb.weight"]


def _check_float_tensor(t: object, where: str, shape: tuple[int, ...]) -> None:
    if not isinstance(t, Tensor):
        raise CheckpointError(f"{where} is a {type(t).__name__}, not a tensor")
    if t.dtype != torch.float32:
        raise CheckpointError(f"{where} is {t.dtype}, not torch.float32")
    if tuple(t.shape) != shape:
        raise CheckpointError(
            f"{where} has shape {tuple(t.shape)}, but the config requires {shape}"
        )


def _check_optimizer_state(
    optimizer_state: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check the layout of a torch.optim state_dict and the shapes of our optimizers' tensors."""
    per_parameter, groups = optimizer_state.get("state"), optimizer_state.get("param_groups")
    if type(per_parameter) is not dict or type(groups) is not list:
        raise CheckpointError("optimizer_state is not the state_dict of a torch.optim optimizer")
    for i, group in enumerate(groups):
        where = f"optimizer_state.param_groups[{i}]"
        if type(group) is not dict or not _is_numbering(group.get("params")):
            raise CheckpointError(f"{where} lists no parameters")
        if not _is_list_of(group.get("param_names", []), str):
            raise CheckpointError(f"{where}.param_names is not a list of names")
    ids = [i for group in groups for i in group["params"]]
    if len(set(ids)) != len(ids):
        raise CheckpointError("optimizer_state.param_groups lists a parameter twice")
    names, known, fields = names_by_id(groups, list(shapes)), set(ids), state_fields()
    for i, entry in per_parameter.items():
        where = f"optimizer_state.state.{show(i)}"
        if i not in known or type(entry) is not dict:
            raise CheckpointError(f"{where} belongs to no parameter")
        if "step" in entry and not _is_number(entry["step"]):
            raise CheckpointError(f"{where}.step is not a number")
        for field in sorted(fields & entry.keys()) if i in names else ():
            _check_float_tensor(entry[field], f"{where}.{field}", shapes[names[i]])


def _is_list_of(value: object, kind: type) -> bool:
    return type(value) is list and all(type(item) is kind for item in value)


def _is_numbering(value: object) -> bool:
    return _is_list_of(value, int) and not any(map(key_problem, value))  # type: ignore[call-overload]


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return type(value) in (int, float)


def _check_finite(tensors: Tensors) -> None:
    for where, t in tensors:
        if _section(where) in ("model_state", "optimizer_state") and not _is_finite(t):
            raise CheckpointError(f"{_name(where)} has a value that is not finite")


def _is_finite(t: Tensor) -> bool:
    if not t.is_floating_point() or not t.numel():
        return True
    return all(math.isfinite(bound.item()) for bound in torch.aminmax(t))


# --- names and shapes --------------------------------------------------------------------------


def parameter_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape in the order of `GPT(cfg).parameters()`, which is the optimizer's.

    Only one block is built, so that a large depth in a file costs nothing.
    """
    one = {n: tuple(p.shape) for n, p in skeleton(replace(cfg, L=1)).named_parameters()}
    first = "blocks.0."
    block = {n.removeprefix(first): one.pop(n) for n in list(one) if n.startswith(first)}
    blocks = {f"blocks.{i}.{n}": shape for i in range(cfg.L) for n, shape in block.items()}
    return {"tok_emb.weight": one.pop("tok_emb.weight"), **blocks, **one}


def names_by_id(groups: Sequence[Mapping[str, Any]], names: list[str]) -> dict[int, str]:
    """Return the name of each parameter number of an optimizer; empty if they are unknown.

    A single group over `model.parameters()` numbers them in order. Several groups use their own
    order, which is known only if the optimizer was given names.
    """
    named = {
        i: name
        for group in groups
        for i, name in zip(group["params"], group.get("param_names", []), strict=False)
    }
    if set(named.values()) == set(names):
        return named
    if len(groups) == 1 and len(groups[0]["params"]) == len(names):
        return dict(zip(groups[0]["params"], names, strict=True))
    return {}


# --- files -------------------------------------------------------------------------------------


def write_payload(paths: Sequence[str | os.PathLike[str]], payload: Mapping[str, Any]) -> str:
    """Write a payload durably under each name in turn; return its digest.

    Payload and file must pass the checks of loading: a file that would not load is never written.

    Raises:
        CheckpointError: if a value cannot be stored or is not finite.
        OSError: if a file cannot be written; that name and those after it keep their content.
    """
    where = ", ".join(str(path) for path in paths)
    try:
        content = {key: value for key, value in payload.items() if key != "digest"}
        content = check_payload(canonical_payload(content))
        digest = content_digest(content)
        file = _encoded(content, digest)
        check_torch_file(file)
    except CheckpointError as error:
        raise CheckpointError(f"not saved to {where}: {error}") from None
    # without a copy, and no getbuffer(): some Pythons crash collecting one that an error holds
    data = file.getvalue()
    durable.write_durably([Path(path) for path in paths], data)
    return digest


def read_payload(path: Path) -> Payload:
    """Read a file and check all of it: container, content, and the digest if there is one.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not a good checkpoint, naming the first difference.
    """
    payload = check_payload(read_torch_file(path))
    if "digest" in payload and payload["digest"] != content_digest(payload):
        raise CheckpointError("the content does not match its digest")
    return payload


def file_size(payload: Mapping[str, Any]) -> int:
    """Return the size of a payload's file in bytes; the payload is not checked."""
    return _encoded(canonical_payload(payload), "0" * 64).getbuffer().nbytes


def _encoded(content: Payload, digest: str) -> io.BytesIO:
    file = io.BytesIO()
    torch.save({**content, "digest": digest}, file)
    return file
