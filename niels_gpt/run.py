"""A run: the loop with its ports connected to the folder, the console, the clock and signals."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from torch import Tensor

from niels_gpt import durable, loop
from niels_gpt.checkpoint import (
    METRICS,
    load_checkpoint,
    own_files,
    state_payload,
    write_checkpoint,
)
from niels_gpt.compiled import StepFunction, choose_step
from niels_gpt.console import Console
from niels_gpt.eval import evaluate
from niels_gpt.failures import describe
from niels_gpt.loop import LATEST, NonFiniteError, Scores
from niels_gpt.loss import Batch
from niels_gpt.lr_schedule import lr_of_step
from niels_gpt.metrics import MetricsFile
from niels_gpt.options import TrainOptions
from niels_gpt.plan import Plan
from niels_gpt.record import checkpoint_extra
from niels_gpt.state import TrainState
from niels_gpt.step import batch_of_step, train_step
from niels_gpt.stop import Stop, Stopped
from niels_gpt.torchfile import CheckpointError


def train(plan: Plan, options: TrainOptions, console: Console, stop: Stop) -> int:
    """Run the loop on a plan and return the exit code; everything else goes to the console."""
    say_opening(plan, console)
    folder = Folder(plan, console)
    try:
        step = _step_of(plan, folder, console, stop)
        reporter = Reporter(plan, folder.metrics, console)
        ports = ports_of(plan, folder, reporter, stop, step)
        state, scores, saved = loop.run(plan.state, plan.scores, ports)
    except Stopped as stopped:
        console.warn(f"stopped by {stopped}; {folder.last_good()}")
        console.warn(resume_line(options, folder.path))
        return stopped.exit_code if folder.is_saved else 1
    except (NonFiniteError, RuntimeError, MemoryError, OSError) as error:
        console.warn(f"error: {describe(error)}; {folder.last_good()}")
        return 1
    if not saved:
        console.warn(f"error: the final save failed; {folder.last_good()}")
        return 1
    reporter.closing(state, scores)
    console.say(resume_line(options, folder.path))
    return 0


def _step_of(plan: Plan, folder: Folder, console: Console, stop: Stop) -> StepFunction:
    """Return the step to train with, compiled if asked for; the folder notes which it is."""
    state = plan.state
    if not plan.environment["compile"] or state.step >= state.train_cfg.total_steps:
        return train_step
    try:
        with stop.immediately():
            step, is_compiled = choose_step(state, _batch(plan, state.step), console.say)
    except Stopped:
        if plan.resumed is None:
            folder.save([LATEST], state, plan.scores)
        raise
    folder.environment = {**plan.environment, "compile": is_compiled}
    return step


def _batch(plan: Plan, step: int) -> Batch:
    cfg = plan.state.train_cfg
    return batch_of_step(
        cfg.seed,
        step,
        plan.train,
        p=plan.p,
        B=cfg.B,
        T=plan.state.model_cfg.T,
        device=plan.environment["device"],
    )


def ports_of(
    plan: Plan, folder: Folder, reporter: Reporter, stop: Stop, step: StepFunction = train_step
) -> loop.Ports:
    """Connect the loop: batches and rates of the plan, and what becomes of states and numbers."""
    cfg = plan.state.train_cfg
    return loop.Ports(
        batch=lambda step: _batch(plan, step),
        lr=lambda step: lr_of_step(step, cfg),
        step=step,
        evaluate=lambda state: evaluate(state, plan.val["wiki"], cfg.seed),
        on_step=reporter.on_step,
        on_log=reporter.on_log,
        on_eval=reporter.on_eval,
        save=folder.save,
        check_stop=stop.check,
        may_stop=stop.immediately,
        check_each=plan.environment["device"] == "cpu",
    )


class Folder:
    """The output folder, claimed at the first save: a run that saves nothing moves nothing."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self.path = plan.out
        self.metrics = MetricsFile(plan.out / METRICS, plan.records)
        self.is_saved = plan.resumed is not None  # whether the last save succeeded
        self.environment = plan.environment  # as the checkpoints tell it
        self._plan = plan
        self._console = console
        self._claimed = False
        self._good = plan.resumed.path if plan.resumed else None

    def save(self, names: Sequence[str], state: TrainState, scores: Scores) -> bool:
        """Save a state durably under each name in turn; say so when it fails, and return False."""
        extra = checkpoint_extra(scores, self._plan.sources, self.environment)
        payload = state_payload(state, best_val_loss=scores.best_val_loss, extra=extra)
        try:
            self._claim()
            self._sync_metrics()
            write_checkpoint([self.path / name for name in names], payload)
        except (OSError, CheckpointError) as error:
            self.is_saved = False
            self._console.warn(
                f"SAVE FAILED after step {state.step}: {error}; "
                f"the next save tries again; {self.last_good()}"
            )
            return False
        self.is_saved, self._good = True, self.path / names[-1]
        self._console.say(f"saved {', '.join(names)} after step {state.step}")
        return True

    def last_good(self) -> str:
        """Name the newest checkpoint that this run knows to be good."""
        return f"last good checkpoint: {self._good}" if self._good else "no checkpoint yet"

    def _claim(self) -> None:
        """Make the folder this run's: what an earlier run left there moves into a subfolder."""
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
        """A log that cannot be written does not keep a checkpoint from being saved."""
        try:
            self.metrics.sync()
        except OSError as error:
            self._console.warn(
                f"{self.metrics.path}: {error.strerror}; tried again at the next save"
            )


def _is_in(path: Path, folder: Path) -> bool:
    return path.parent.resolve() == folder.resolve()


def _is_later(path: Path, step: int) -> bool:
    """Tell whether a file of the folder is a checkpoint of a later step, or not a good one."""
    if path.name == METRICS:
        return False
    if path.name.startswith("step_"):
        return int(path.stem.removeprefix("step_")) > step
    try:
        later: bool = load_checkpoint(path, device="cpu")["step"] > step
    except (CheckpointError, FileNotFoundError):  # the latter for a link to nowhere
        return True
    return later


def say_opening(plan: Plan, console: Console) -> None:
    """Say what is trained, on what, from where."""
    for note in plan.notes:
        console.warn(f"note: {note}")
    for split, sources in plan.sources.items():
        for name, info in sources.items():
            console.say(
                f"{split}/{name}: {info['origin']}, {info['bytes']:,} bytes, "
                f"sha256 {info['sha256'][:12]}"
            )
    state = plan.state
    count = sum(p.numel() for p in state.params.values())
    step_bytes = state.train_cfg.B * state.model_cfg.T
    environment = ", ".join(f"{name} {value}" for name, value in plan.environment.items())
    console.say(f"{count:,} parameters, {step_bytes:,} bytes a step; {environment}")
    chosen = "compiled" if plan.environment["compile"] else "not compiled"
    console.say(f"the step is {chosen}: {plan.why_compile} (--compile or --no-compile to choose)")
    if plan.resumed:
        console.say(f"resuming {plan.resumed.path} after step {state.step}")


class Reporter:
    """Turns what the loop does into lines, a live line, and records with the clock in them."""

    def __init__(self, plan: Plan, metrics: MetricsFile, console: Console) -> None:
        cfg = plan.state.train_cfg
        self._plan, self._metrics, self._console = plan, metrics, console
        self._total = cfg.total_steps
        self._batch_bytes = cfg.B * plan.state.model_cfg.T
        self._before = max((r.get("seconds", 0.0) for r in plan.records), default=0.0)
        self._losses: list[float] = []  # first and last logged
        self._start = self._last_time = time.monotonic()
        self._last_step = plan.state.step
        self._shown = 0.0

    def on_step(self, step: int, lr: float, metrics: dict[str, Tensor]) -> None:
        """Refresh the live line, at most twice a second: on a GPU it waits for the step."""
        now = time.monotonic()
        if self._console.is_live and now - self._shown > 0.5:
            self._shown = now
            speed = self._speed(step, now)
            left = (self._total - step) * self._batch_bytes / speed
            self._console.show(
                f"step {step}/{self._total}  loss {metrics['loss'].item():.4f}  lr {lr:.3g}  "
                f"{speed:,.0f} bytes/s  {_duration(left)} left"
            )

    def on_log(self, step: int, lr: float, values: dict[str, float]) -> None:
        """Print a log line and keep a record."""
        now = time.monotonic()
        speed = self._speed(step, now)
        self._losses = [*self._losses[:1], values["loss"]]
        self._console.say(
            f"step {step:>6}/{self._total}  loss {values['loss']:.4f}  lr {lr:.3e}  "
            f"{speed:,.0f} bytes/s"
        )
        self._record("train", step, now, {**values, "lr": lr}, bytes_per_s=round(speed))
        self._last_time, self._last_step = now, step

    def on_eval(self, step: int, scores: Scores) -> None:
        """Print an evaluation and keep a record; its time does not count into the speed."""
        now = time.monotonic()
        loss = scores.val_loss
        assert loss is not None
        best = "  best so far" if scores.best_step == step else ""
        self._console.say(
            f"step {step:>6}/{self._total}  val_wiki_loss {loss:.4f} nats  "
            f"{loss / math.log(2):.4f} bits/byte{best}"
        )
        self._record("eval", step, now, {"val_wiki_loss": loss})
        self._last_time, self._last_step = now, step

    def closing(self, state: TrainState, scores: Scores) -> None:
        """Sum up the run."""
        say = self._console.say
        say(f"finished {state.step} steps in {_duration(time.monotonic() - self._start)}")
        if self._losses:
            say(f"training loss: first logged {self._losses[0]:.4f}, last {self._losses[-1]:.4f}")
        if scores.val_loss is not None:
            known = scores.best_step is not None  # not by the checkpoint of a plain loop
            say(
                f"validation loss (wiki): {scores.val_loss:.4f} nats; best "
                f"{scores.best_val_loss:.4f}"
                f"{f' after step {scores.best_step}' if known else ' before this run'}"
            )
        say(f"files: {self._plan.out}")

    def _speed(self, step: int, now: float) -> float:
        steps = max(1, step - self._last_step)
        return steps * self._batch_bytes / max(now - self._last_time, 1e-9)

    def _record(
        self, kind: str, step: int, now: float, values: dict[str, float], **clock: float
    ) -> None:
        seen = {"kind": kind, "step": step, "bytes": step * self._batch_bytes}
        seconds = round(self._before + now - self._start, 3)
        try:
            self._metrics.add({**seen, **values, "seconds": seconds, **clock})
        except OSError as error:
            self._console.warn(f"{self._metrics.path}: {error.strerror}; tried again later")


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def resume_line(options: TrainOptions, folder: Path) -> str:
    """Return the command that goes on from the last checkpoint of this run."""
    given = {
        "--config": [options.config],
        "--set": options.overrides,
        **{f"--{name}": [getattr(options, name)] for name in ("wiki", "roam", "primer", "device")},
        "--resume": [folder / LATEST],
    }
    words = [
        [option, str(value)]
        for option, values in given.items()
        for value in values
        if value is not None
    ]
    return f"resume with: niels-gpt train {shlex.join(chain.from_iterable(words))}"
