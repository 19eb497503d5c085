"""The output folder of a run: its checkpoints and metrics, and files of earlier runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from niels_gpt.checkpoint import (
    Checkpoint,
    checkpoint_of,
    digest_of,
    read_checkpoint,
    write_checkpoint,
)
from niels_gpt.eval import Scores
from niels_gpt.files import durable
from niels_gpt.files.names import BEST, CALL, LATEST, METRICS, run_files, step_of_name
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
        self.good = plan.resumed.path if plan.resumed else None  # the newest good checkpoint
        self.is_saved = False  # whether the last save succeeded
        self.has_own = False  # whether `good` holds all that this run was given
        self.environment = plan.environment  # as stored in checkpoints
        self._plan = plan
        self._console = console
        self._claimed = False
        # The best state so far and the scores it had, while its best.pt is yet to be written here.
        self._owed_best: tuple[TrainState, Scores] | None = None
        if not plan.has_best and plan.scores.best_step == plan.state.step:
            self._owed_best = plan.state, plan.scores

    def save(self, names: Sequence[str], state: TrainState, scores: Scores) -> bool:
        """Save a state durably under each name in turn; on failure, report it and return False.

        A `best.pt` that cannot be written prevents no other file; it is tried again at each save. A
        `latest.pt` that the run was resumed from and that is this very state stays as it is.
        """
        checkpoint = self._checkpoint(state, scores)
        jobs = [(names, checkpoint)]
        if BEST in names:
            self._owed_best = state, scores
        elif self._owed_best is not None:
            jobs.insert(0, ([BEST], self._checkpoint(*self._owed_best)))
        self.is_saved = all([self._write(*job) for job in jobs])  # a list: each is tried
        if self.is_saved:
            self._owed_best = None
        return self.is_saved

    def _write(self, names: Sequence[str], checkpoint: Checkpoint) -> bool:
        """Write a checkpoint under each name in turn; report a failure and return False."""
        try:
            if names == [LATEST] and self._is_there(checkpoint):
                self.has_own = True
                return True
            self._claim()
            self._sync_metrics()
            write_checkpoint([self.path / name for name in names], checkpoint)
        except (OSError, CheckpointError) as error:
            but = "".join(f", but not {name}" for name in names if name not in (BEST, LATEST))
            self._console.warn(
                f"SAVE FAILED after step {checkpoint.step}: {error}; "
                f"the next save will retry{but}; {self.last_good()}"
            )
            if getattr(error, "filename", None) == str(self.path / BEST) and names[1:]:
                self._write(names[1:], checkpoint)
            return False
        self._console.say(f"saved {', '.join(names)} after step {checkpoint.step}")
        if LATEST in names:
            self.good, self.has_own = self.path / LATEST, True
        return True

    def last_good(self) -> str:
        """Name the newest checkpoint known to be good."""
        return f"last good checkpoint: {self.good}" if self.good else "no checkpoint yet"

    def _checkpoint(self, state: TrainState, scores: Scores) -> Checkpoint:
        plan = self._plan
        return checkpoint_of(state, scores, plan.corpus.record, self.environment, plan.ancestors)

    def _is_there(self, checkpoint: Checkpoint) -> bool:
        """Return whether `latest.pt` is this checkpoint: the resumed one, unchanged."""
        resumed = self._plan.resumed
        if resumed is None or self._claimed or self._owed_best is not None:
            return False
        is_latest = resumed.path.name == LATEST and _is_in(resumed.path, self.path)
        return is_latest and resumed.digest == digest_of(checkpoint)

    def _claim(self) -> None:
        """Claim the folder for this run: move files of an earlier run into a subfolder."""
        if self._claimed:
            return
        durable.remove_temporaries(self.path)
        earlier, resumed = files_of_another_run(self._plan), self._plan.resumed
        if earlier:
            names = [path.name for path in earlier]
            if os.path.lexists(self.path / CALL):
                names.append(CALL)
            goes_on = resumed is not None and _is_in(resumed.path, self.path)
            copied = (METRICS, CALL) if goes_on else ()  # a resume needs them: new ones follow
            aside = durable.set_aside(self.path, names, copied=copied)
            self._console.say(f"moved {len(earlier)} files of an earlier run to {aside}")
        self._keep_call()
        if kept := self.metrics.claim():
            self._console.say(f"kept the damaged {METRICS} as {kept}")
        self._claimed = True

    def _keep_call(self) -> None:
        """Keep how the run is called; a failure does not prevent saving a checkpoint."""
        try:
            self._plan.call.write(self.path)
        except OSError as error:
            self._console.warn(f"{error.filename}: {error.strerror}; a resume must name the texts")

    def _sync_metrics(self) -> None:
        """Sync the metrics; a failure does not prevent saving a checkpoint."""
        try:
            self.metrics.sync()
        except OSError as error:
            self._console.warn(f"{self.metrics.path}: {error.strerror}; the next save will retry")


def files_of_another_run(plan: Plan) -> list[Path]:
    """List the files in its folder that a run moves aside: of the resumed run, later ones only."""
    there, resumed = run_files(plan.out), plan.resumed
    if resumed is None or not _is_in(resumed.path, plan.out):
        return there
    later = [path for path in there if _is_later(path, resumed, plan.has_best)]
    metrics = [path for path in there if path.name == METRICS]
    return [*later, *metrics] if later else []


def _is_later(path: Path, resumed: Checkpoint, has_best: bool) -> bool:
    """Return whether a checkpoint in the folder is of a later step, damaged or another best."""
    if path.name in (METRICS, resumed.path.name):
        return False
    if (promised := step_of_name(path.name)) is not None:
        return promised > resumed.step
    try:
        step = read_checkpoint(path).step
    except (CheckpointError, FileNotFoundError):  # the latter for a dangling link
        return True
    is_other_best = path.name == BEST and not has_best
    return step > resumed.step or (is_other_best and step < resumed.step)


def _is_in(path: Path, folder: Path) -> bool:
    return path.parent.resolve() == folder.resolve()
