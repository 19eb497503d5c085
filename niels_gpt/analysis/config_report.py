"""A resolved config and the origin of each value. Standard library only."""

import os
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NamedTuple

from niels_gpt.config import (
    MAX_CONFIG_BYTES,
    SECTIONS,
    apply_overrides,
    config_from_dict,
    dotted,
    load_json,
    to_dict,
)

DEFAULT = "default"
OVERRIDE = "--set"


class Setting(NamedTuple):
    """One value of a config."""

    key: str  # as `--set` takes it, e.g. "train.p_train.wiki"
    value: float | str
    origin: str  # `DEFAULT`, the config file, or `OVERRIDE`
    default: float | str | None  # None for a source that the default does not have
    meaning: str


def resolve(
    path: str | os.PathLike[str] | None, overrides: Iterable[str] = ()
) -> tuple[list[Setting], dict[str, Any]]:
    """Resolve a config file (None for the defaults alone) and `--set` arguments.

    Returns the settings, and the config as a document that can be saved as a file.

    Raises:
        FileNotFoundError, ValueError: as `load_config_from_json`.
    """
    overrides = tuple(overrides)
    doc = {} if path is None else load_json(path, max_bytes=MAX_CONFIG_BYTES)
    where = DEFAULT if path is None else str(path)
    resolved = _document(apply_overrides(doc, overrides, where=where), where)
    origins = dict.fromkeys(dotted(resolved), DEFAULT)
    if path is not None:
        origins = _claim(origins, dotted(doc), where)
    for override in overrides:
        origins = _claim(origins, [override.partition("=")[0].strip()], OVERRIDE)
    defaults = dotted(_document({}, DEFAULT))
    meanings = _meanings()
    settings = [
        Setting(key, value, origins[key], defaults.get(key), meanings[_field_of(key)])
        for key, value in dotted(resolved).items()
    ]
    return settings, resolved


def _document(doc: object, where: str) -> dict[str, Any]:
    configs = config_from_dict(doc, where=where, from_file=True)
    return {name: to_dict(config) for name, config in zip(SECTIONS, configs, strict=True)}


def _claim(origins: dict[str, str], keys: Iterable[str], origin: str) -> dict[str, str]:
    """Set the origin of these keys and all keys below them."""
    keys = tuple(keys)
    return {
        key: origin if any(key == k or key.startswith(f"{k}.") for k in keys) else before
        for key, before in origins.items()
    }


def _field_of(key: str) -> str:
    return ".".join(key.split(".")[:2])


def _meanings() -> dict[str, str]:
    return {
        f"{section}.{f.name}": f.metadata["meaning"]
        for section, cls in SECTIONS.items()
        for f in fields(cls)
    }
