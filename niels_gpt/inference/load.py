"""Load a model to use it."""

import os
from typing import Any, NamedTuple

import torch

from niels_gpt.checkpoint import load_checkpoint
from niels_gpt.config import ModelConfig, config_from_dict
from niels_gpt.files.schema import parameter_shapes
from niels_gpt.optim.trees import Tree


class Trained(NamedTuple):
    """A model, and all that its checkpoint holds (on the CPU)."""

    cfg: ModelConfig
    params: Tree  # as in `TrainState`, on the device asked for
    payload: dict[str, Any]


def load_model(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Trained:
    """Read the model of a checkpoint, whatever program trained it, once it is verified.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not a good checkpoint.
        ValueError: if its model does not know all 256 byte values.
    """
    payload = load_checkpoint(path, device="cpu")
    cfg, _ = config_from_dict({"model": payload["model_cfg"]}, where=f"the model of {path}")
    if cfg.V < 256:
        raise ValueError(
            f"{path}: a model of bytes needs model.V of at least 256, this has {cfg.V}"
        )
    state = payload["model_state"]
    return Trained(cfg, {name: state[name].to(device) for name in parameter_shapes(cfg)}, payload)
