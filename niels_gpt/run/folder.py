"""The output folder of a run: its checkpoints and metrics, and files of earlier runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from niels_gpt.checkpoint import (
    METRICS,
    load_checkpoint,
    own_files,
    state_payload,
    write_checkpoint,
)
from niels_gpt.files import durable
from niels_gpt.files.torchfile import CheckpointError
from niels_gpt.record import checkpoint_extra
from niels_gpt.run.loop import Scores
from niels_gpt.run.metrics import MetricsFile
from niels_gpt.run.plan import Plan
from niels_gpt.run.progress import Console
from niels_gpt.state import TrainState


class Folder:
    """The output folder, claimed at the first save: a run that saves nothing moves nothing."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self.path = plan.out
        self.metrics = MetricsFile(plan.out / METRICS, plan.records)
        self.is_saved = plan.resumed is not None  # whether the last save succeeded
        self.environment = plan.environment  # as stored in checkpoints
        self._plan = plan
        self._console = console
        self._claimed = False
        self._good = plan.resumed.path if plan.resumed else None

    def save(self, names: Sequence[str], state: TrainState, scores: Scores) -> bool:
        """Save a state durably under each name in turn; on failure, report it and return False."""
        extra = checkpoint_extra(scores, self._plan.corpus.record, self.environment)
        payload = state_payload(state, best_val_loss=scores.best_val_loss, extra=extra)
        try:
            self._claim()
            self._sync_metrics()
            write_checkpoint([self.path / name for name in names], payload)
        except (OSError, CheckpointError) as error:
            self.is_saved = False
            self._console.warn(
                f"SAVE FAILED after step {state.step}: {error}; "
                f"the next save will retry; {self.last_good()}"
            )
            return False
        self.is_saved, self._good = True, self.path / names[-1]
        self._console.say(f"saved {', '.join(names)} after step {state.step}")
        return True

    def last_good(self) -> str:
        """Name the newest checkpoint known to be good."""
        return f"last good checkpoint: {self._good}" if self._good else "no checkpoint yet"

    def _claim(self) -> None:
        """Claim the folder for this run: move files of an earlier run into a subfolder."""
        if self._claimed:
            return
        durable.remove_temporaries(self.path)
        earlier = own_files(self.path)
        if self._plan.resumed and _is_in(self._plan.resumed.path, self.path):
            start = self._plan.state.step
            earlier = [name for name in earlier if _is_later(self.path / name, start)]
        if earlier:
            if METRICS not in earlier and (self.path / METRICS).exists():
                earlier.append(METRICS)
            aside = durable.set_aside(self.path, earlier)
            self._console.say(f"moved {len(earlier)} files of an earlier run to {aside}")
        self.metrics.claim()
        self._claimed = True

    def _sync_metrics(self) -> None:
        """Sync the metrics; a failure does not prevent saving a checkpoint."""
        try:
            self.metrics.sync()
        except OSError as error:
            self._console.warn(f"{self.metrics.path}: {error.strerror}; the next save will retry")


def _is_in(path: Path, folder: Path) -> bool:
    return path.parent.resolve() == folder.resolve()


def _is_later(path: Path, step: int) -> bool:
    """Return whether a file of the folder is a checkpoint of a later step, or damaged."""
    if path.name == METRICS:
        return False
    if path.name.startswith("step_"):
        return int(path.stem.removeprefix("step_")) > step
    try:
        later: bool = load_checkpoint(path, device="cpu")["step"] > step
    except (CheckpointError, FileNotFoundError):  # the latter for a dangling link
        return True
    return later
