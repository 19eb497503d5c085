"""What a run keeps in its checkpoints beside pr-06's six keys: written and read back here.

`scores` are the evaluations so far, `sources` says which text was trained on, `environment` what
else can change bits. A checkpoint of another program may lack them; one that holds something else
under these names is refused, since a resume would rely on it.
"""

from collections.abc import Mapping
from typing import Any

from niels_gpt.files.torchfile import CheckpointError, show
from niels_gpt.run.loop import Scores

Sources = dict[str, dict[str, dict[str, Any]]]  # split -> source -> origin, bytes, sha256

_STREAM = {"origin": str, "bytes": int, "sha256": str}


def checkpoint_extra(
    scores: Scores, sources: Mapping[str, Any], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the keys that a checkpoint gets beside the six."""
    kept = scores._asdict()
    del kept["best_val_loss"]
    return {"scores": kept, "sources": sources, "environment": environment}


def kept_scores(payload: Mapping[str, Any]) -> Scores:
    """Return the evaluations that a checkpoint knows of.

    Raises:
        CheckpointError: if they are not numbers.
    """
    kept = _table(payload, "scores")
    for name, value in kept.items():
        if value is not None and not isinstance(value, int | float):
            raise CheckpointError(f"scores.{name} is {show(value)}, not a number")
    names = ("best_step", "val_loss", "val_step")
    return Scores(payload["best_val_loss"], *(kept.get(name) for name in names))


def kept_sources(payload: Mapping[str, Any]) -> Sources | None:
    """Return which text a checkpoint was trained on, None where it does not say.

    Raises:
        CheckpointError: if a stream has no origin, bytes and sha256.
    """
    if "sources" not in payload:
        return None
    kept = _table(payload, "sources")
    for split in ("train", "val"):
        streams = _table(kept, split)
        for name in streams:
            stream = _table(streams, name)
            for key, kind in _STREAM.items():
                if not isinstance(stream.get(key), kind):
                    raise CheckpointError(
                        f"sources.{split}.{name}.{key} is {show(stream.get(key))}"
                    )
    return {split: kept.get(split, {}) for split in ("train", "val")}


def kept_environment(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run was made under, {} where the checkpoint does not say.

    Raises:
        CheckpointError: if the number of threads is not one.
    """
    kept = _table(payload, "environment")
    threads = kept.get("threads", 1)
    if not isinstance(threads, int) or not 1 <= threads <= 4096:
        raise CheckpointError(f"environment.threads is {show(threads)}")
    return kept


def _table(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key, {})
    if not isinstance(value, dict):
        raise CheckpointError(f"{key} is {show(value)}, not a table")
    return value
