"""The output folder of a run: its checkpoints and metrics, and files of earlier runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from niels_gpt.checkpoint import Checkpoint, checkpoint_of, read_checkpoint, write_checkpoint
from niels_gpt.eval import Scores
from niels_gpt.files import durable
from niels_gpt.files.names import METRICS, run_files, step_of_name
from niels_gpt.files.torchfile import CheckpointError
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
        checkpoint = checkpoint_of(state, scores, self._plan.corpus.record, self.environment)
        try:
            self._claim()
            self._sync_metrics()
            write_checkpoint([self.path / name for name in names], checkpoint)
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
        earlier = self._files_of_another_run()
        if earlier:
            aside = durable.set_aside(self.path, [path.name for path in earlier])
            self._console.say(f"moved {len(earlier)} files of an earlier run to {aside}")
        self.metrics.claim()
        self._claimed = True

    def _files_of_another_run(self) -> list[Path]:
        """List the files to move aside: of the resumed run, only those of later steps."""
        there, resumed = run_files(self.path), self._plan.resumed
        if resumed is None or not _is_in(resumed.path, self.path):
            return there
        later = [path for path in there if self._is_later(path, resumed)]
        metrics = [path for path in there if path.name == METRICS]
        return [*later, *metrics] if later else []

    def _is_later(self, path: Path, resumed: Checkpoint) -> bool:
        """Return whether a file of the folder is a checkpoint of a later step, or damaged."""
        if (promised := step_of_name(path.name)) is not None:
            return promised > resumed.step
        if path.name in (METRICS, resumed.path.name):
            return False
        try:
            return read_checkpoint(path).step > resumed.step
        except (CheckpointError, FileNotFoundError):  # the latter for a dangling link
            return True

    def _sync_metrics(self) -> None:
        """Sync the metrics; a failure does not prevent saving a checkpoint."""
        try:
            self.metrics.sync()
        except OSError as error:
            self._console.warn(f"{self.metrics.path}: {error.strerror}; the next save will retry")


def _is_in(path: Path, folder: Path) -> bool:
    return path.parent.resolve() == folder.resolve()
