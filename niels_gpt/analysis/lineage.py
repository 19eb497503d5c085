"""Find the checkpoint whose weights a run began with: its digest is known, not its place."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from niels_gpt import paths
from niels_gpt.checkpoint import Checkpoint, read_checkpoint
from niels_gpt.files.names import checkpoint_files, step_of_name
from niels_gpt.files.torchfile import CheckpointError


def is_parent(found: Checkpoint, run: Checkpoint) -> bool:
    """Return whether a run began with the weights of a checkpoint."""
    return found.lineage == run.ancestors


def told_of(parent: Checkpoint) -> str:
    """Return a message that names where a run began."""
    return f"the run began with the weights of {parent.path}, after step {parent.step:,} of its own"


def find_parent(run: Checkpoint) -> Checkpoint:
    """Return the checkpoint that a run began with, by its digest.

    It is looked for beside the run's checkpoint, in the folders beside and below that, where a new
    run moves earlier files, and in the checkpoint folder.

    Raises:
        FileNotFoundError: if it is not there.
    """
    wanted = run.ancestors[0]
    for path in _candidates(run.path.absolute().parent):
        if step_of_name(path.name) in (None, wanted.step):
            with contextlib.suppress(CheckpointError, OSError):
                found = read_checkpoint(path)
                if is_parent(found, run):
                    return found
    raise FileNotFoundError(
        f"{run.path}: its run began with the weights of another checkpoint (after step "
        f"{wanted.step:,}, sha256 {wanted.digest[:12]}), which is not in the folders here or in "
        f"{paths.CHECKPOINT_DIR}; copy it to {run.path.parent}, or name it with --from and --to"
    )


def _candidates(folder: Path) -> Iterator[Path]:
    """Yield the checkpoints of the folders where the parent may be, the nearest first."""
    around = [folder, *_subfolders(folder), folder.parent, *_subfolders(folder.parent)]
    general = [paths.CHECKPOINT_DIR, *_subfolders(paths.CHECKPOINT_DIR)]
    for place in dict.fromkeys([*around, *general]):
        with contextlib.suppress(OSError):
            yield from checkpoint_files(place)


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []
