"""Open a checkpoint to use its model."""

import os

import torch

from niels_gpt.checkpoint import Checkpoint, open_checkpoint


def load_model(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Checkpoint:
    """Open the checkpoint of a model of bytes, whatever program trained it; see `open_checkpoint`.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not a good checkpoint.
        ValueError: if its model does not know all 256 byte values.
    """
    checkpoint = open_checkpoint(path, device)
    if checkpoint.cfg.V < 256:
        raise ValueError(
            f"{path}: a model of bytes needs model.V of at least 256, this has {checkpoint.cfg.V}"
        )
    return checkpoint
