"""Loading a model from a checkpoint."""

import os

import torch

from niels_gpt.checkpoint import Checkpoint, open_checkpoint


def load_model(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Checkpoint:
    """Open the checkpoint of a byte-level model, from any program; see `open_checkpoint`.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is invalid.
        ValueError: if its vocabulary has fewer than 256 values.
    """
    checkpoint = open_checkpoint(path, device)
    if checkpoint.cfg.V < 256:
        raise ValueError(
            f"{path}: a byte-level model needs model.V of at least 256, not {checkpoint.cfg.V}"
        )
    return checkpoint
