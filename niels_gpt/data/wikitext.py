"""WikiText-103 through the optional package `datasets`."""

from importlib import import_module
from typing import Any

_HUB_NAMES = ("wikitext", "Salesforce/wikitext")  # newer hubs know only the second
_HUB_CONFIG = "wikitext-103-raw-v1"
_HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}


def load_dataset(*args: Any, **kwargs: Any) -> Any:
    """Import `datasets` and call its `load_dataset`; ImportError says how to install it."""
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise ImportError(
            'the package "datasets" is not installed: pip install datasets'
        ) from error
    return datasets.load_dataset(*args, **kwargs)


def load_wikitext() -> dict[str, list[str]]:
    """Load WikiText-103 (raw) as lines per split: train, val, test. Blank lines are dropped.

    Raises:
        ImportError: if `datasets` is not installed.
        RuntimeError: if the hub has the data under none of its names.
    """
    hub = _load_from_hub()
    return {split: _texts(hub[hub_split]) for split, hub_split in _HUB_SPLITS.items()}


def _load_from_hub() -> Any:
    try:
        return load_dataset(_HUB_NAMES[0], _HUB_CONFIG)
    except ImportError:
        raise
    except Exception as first:  # the hub's client raises almost any type
        try:
            return load_dataset(_HUB_NAMES[1], _HUB_CONFIG)
        except Exception as second:
            tried = f"{_HUB_NAMES[0]}: {first}; {_HUB_NAMES[1]}: {second}"
            raise RuntimeError(f"WikiText-103 cannot be loaded: {tried}") from second


def _texts(split: Any) -> list[str]:
    """Read the text column of a hub dataset (fast), or of plain rows."""
    try:
        column = split["text"]
    except TypeError:
        column = (row["text"] for row in split)
    return [text for text in column if text.strip()]
