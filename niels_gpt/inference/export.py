"""Export a model for other programs: safetensors, with the config as JSON beside it.

The format (safetensors 1.0) is a length, a JSON header, and the raw values. It is implemented here
because the package `safetensors` needs NumPy to write torch tensors.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niels_gpt.checkpoint import Checkpoint, open_checkpoint
from niels_gpt.files.durable import make_folder, write_durably
from niels_gpt.files.strict_json import load_json, plain
from niels_gpt.files.torchfile import raw_bytes

MAX_CONFIG_BYTES = 32_000_000  # a checkpoint may hold a train_cfg of half of that


def export(checkpoint: Path, out: Path, *, overwrite: bool = False) -> tuple[Path, Path]:
    """Write the model of a checkpoint to `out` and a `.json` of the same name; return both paths.

    The `.json` is written last, and an old one removed first: wherever this is interrupted, none
    lies beside the model of another export.

    Raises:
        ValueError: if the checkpoint is invalid, or `out` does not end in `.safetensors`.
        FileExistsError: if a file exists, unless `overwrite`.
        OSError: if a file cannot be read or written.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: the name must end in .safetensors")
    config = out.with_suffix(".json")
    if there := [path for path in (out, config) if path.exists() and not overwrite]:
        raise FileExistsError(f"{there[0]}: exists already; --force replaces it")
    found = open_checkpoint(checkpoint)
    make_folder(out.absolute().parent)
    model, new = to_safetensors(found.params), out.with_name(f".{out.name}.new")
    description = {**export_config(found), "sha256": hashlib.sha256(model).hexdigest()}
    text = json.dumps(plain(description), indent=2, allow_nan=False)  # ASCII, whatever is in it
    try:
        write_durably([new], model)
        config.unlink(missing_ok=True)
        new.rename(out)
    finally:
        new.unlink(missing_ok=True)
    write_durably([config], f"{text}\n".encode())
    return out, config


def read_export(out: Path) -> tuple[int, str]:
    """Check that a model and the `.json` beside it belong together; return step and SHA-256.

    Raises:
        ValueError, OSError: if they do not, or cannot be read.
    """
    config = out.with_suffix(".json")
    if not out.is_file():
        raise ValueError("no such file" if not out.exists() else "is not a regular file")
    if not config.is_file():
        raise ValueError(f"{config.name} is missing: the export was not finished")
    with out.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    description = load_json(config, max_bytes=MAX_CONFIG_BYTES)
    found = description if isinstance(description, dict) else {}
    if found.get("sha256") != digest or type(found.get("step")) is not int:
        raise ValueError(f"{config.name} does not describe this model: export again")
    return found["step"], digest


def export_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a program that loads the weights must know."""
    return {
        "architecture": "niels_gpt",
        "model": checkpoint.model_cfg,
        "tied": {"lm_head.weight": "tok_emb.weight"},
        "step": checkpoint.step,
        "best_val_loss_nats": checkpoint.scores.best_val_loss,
        "train": checkpoint.train_cfg,
    }


def to_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Encode float32 tensors, in their order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, t in tensors.items():
        start, end = end, end + t.nbytes
        header[name] = {"dtype": "F32", "shape": [*t.shape], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the values are aligned
    return b"".join([struct.pack("<Q", len(text)), text, *map(_values, tensors.values())])


def _values(t: Tensor) -> bytes:
    return bytes(raw_bytes(t.to("cpu", torch.float32).contiguous()))
