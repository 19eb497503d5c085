"""The best validation loss of a run that is resumed: it belongs to a text and to a folder.

`best.pt` is written when an evaluation improves on the best in the scores. A best of another
validation text, or one whose `best.pt` is not in the output folder, must therefore not be carried
on: nothing might ever improve on it, and the folder would have no `best.pt`, or a wrong one.
"""

from pathlib import Path

from niels_gpt.checkpoint import Checkpoint, SourceRecords, read_checkpoint
from niels_gpt.eval import Scores
from niels_gpt.files.names import BEST
from niels_gpt.files.torchfile import CheckpointError


def resumed_scores(
    resumed: Checkpoint, folder: Path, sources: SourceRecords, val_source: str
) -> tuple[Scores, bool, list[str]]:
    """Return the scores to continue with, whether `best.pt` is there, and messages.

    `val_source` is that of the run now. The scores are those of the checkpoint if its best is
    that of the folder's `best.pt`: a run resumed in place goes on with the same bytes. Otherwise
    the best starts anew, with the evaluation of the resumed state itself, if there is one.
    """
    scores, best = resumed.scores, _described(resumed.scores)
    if _text_changed(resumed, sources, val_source):
        message = f"the validation text changed: the best validation loss{best} starts anew"
        return Scores(val_step=scores.val_step), False, [message] if best else []
    if scores.best_val_loss is None or _has_best(folder, resumed):
        return scores, scores.best_val_loss is not None, []
    anew = scores._replace(best_val_loss=None, best_step=None)
    if scores.val_loss is not None and scores.val_step == resumed.step:
        anew = anew.updated(resumed.step, scores.val_loss)
    if anew == scores:
        return scores, False, []
    message = f"{folder / BEST} is not the best that {resumed.path} knows{best}: it starts anew"
    return anew, False, [message]


def _text_changed(resumed: Checkpoint, now: SourceRecords, val_source: str) -> bool:
    """Return whether the validation text is known to differ from that of the checkpoint."""
    if resumed.sources is None:
        return False
    pairs = ((resumed.sources, resumed.val_source), (now, val_source))
    a, b = (sources["val"].get(name, {}).get("sha256") for sources, name in pairs)
    return a != b


def _has_best(folder: Path, resumed: Checkpoint) -> bool:
    """Return whether the folder is that of the run, and its `best.pt` the best of the scores.

    A checkpoint of another program may not say after which step its best was.
    """
    if resumed.path.parent.resolve() != folder.resolve():
        return False
    try:
        best = read_checkpoint(folder / BEST)
    except (CheckpointError, OSError):
        return False
    known = resumed.scores
    same_step = known.best_step in (None, best.step) and best.step <= resumed.step
    return same_step and best.scores.best_val_loss == known.best_val_loss


def _described(scores: Scores) -> str:
    """Return the best that is not carried on, to be added to a message."""
    if scores.best_val_loss is None:
        return ""
    step = "" if scores.best_step is None else f" after step {scores.best_step}"
    return f" ({scores.best_val_loss:.4f} nats{step})"
