"""The output of a run: log lines, a live line, and timed metrics records."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from niels_gpt.eval import Scores
from niels_gpt.run.metrics import MetricsFile
from niels_gpt.run.plan import Plan
from niels_gpt.state import TrainState
from niels_gpt.units import clock


class Console(Protocol):
    """The output of a run; the command line provides one that writes to the terminal."""

    @property
    def is_live(self) -> bool:
        """Whether a live line is visible."""

    @property
    def is_read(self) -> bool:
        """Whether what is printed can reach anyone."""

    def say(self, *lines: str) -> None:
        """Print lines."""

    def result(self, value: object, lines: Iterable[str], *, as_json: bool) -> None:
        """Print a result: the value as JSON, or the equivalent lines."""

    def show(self, line: str) -> None:
        """Replace the live line; parts, separated by two spaces, are left off if it is too long."""

    def busy(self, what: str) -> AbstractContextManager[Callable[[str], None]]:
        """Say what is being done inside, if it takes long; yields a function that changes it."""

    def tell(self, *messages: str) -> None:
        """Print messages for the user."""

    def warn(self, line: str) -> None:
        """Print a line on stderr."""

    def fail(self, error: BaseException | str, hint: str = "") -> None:
        """Print an error."""


def say_opening(plan: Plan, console: Console) -> None:
    """Print the sources, the model, the environment, and where the run resumes."""
    console.tell(*plan.messages)
    for split, infos in plan.corpus.sources.items():
        console.say(*(f"{split}/{name}: {info}" for name, info in infos.items()))
    state = plan.state
    count = sum(p.numel() for p in state.params.values())
    step_bytes = state.train_cfg.B * state.model_cfg.T
    environment = ", ".join(f"{name} {value}" for name, value in plan.environment.items())
    console.say(f"{count:,} parameters, {step_bytes:,} bytes per step; {environment}")
    chosen = "compiled" if plan.environment["compile"] else "not compiled"
    console.say(f"the step is {chosen}: {plan.why_compile} (--[no-]compile overrides this)")
    if plan.resumed:
        console.say(f"resuming {plan.resumed.path} after step {state.step}")


class Reporter:
    """Reports the loop's progress as log lines, a live line, and timed metrics records."""

    def __init__(self, plan: Plan, metrics: MetricsFile, console: Console) -> None:
        cfg = plan.state.train_cfg
        self._plan, self._metrics, self._console = plan, metrics, console
        self._total = cfg.total_steps
        self._val_loss = f"val_{cfg.val_source}_loss"
        self._batch_bytes = cfg.B * plan.state.model_cfg.T
        self._before = max((r.get("seconds", 0.0) for r in plan.records), default=0.0)
        logged = [r["loss"] for r in plan.records if isinstance(r.get("loss"), float)]
        self._losses = [*logged[:1], *logged[-1:]]  # first and last logged
        self._start = self._last_time = time.monotonic()
        self._last_step = plan.state.step
        self._shown = 0.0
        self.text_step: int | None = None  # after which a text was last asked for

    def on_step(self, step: int, lr: float, metrics: dict[str, Tensor]) -> None:
        """Refresh the live line at most twice a second, because on a GPU it waits for the step."""
        now = time.monotonic()
        if self._console.is_live and now - self._shown > 0.5:
            self._shown = now
            speed = self._speed(step, now)
            left = (self._total - step) * self._batch_bytes / speed
            self._console.show(
                f"step {step}/{self._total}  loss {metrics['loss'].item():.4f}  "
                f"{clock(left)} left  {speed:,.0f} bytes/s  lr {lr:.3g}"
            )

    def on_batch(self, step: int, done: int) -> None:
        """Refresh the live line during an evaluation."""
        now = time.monotonic()
        if self._console.is_live and now - self._shown > 0.5:
            self._shown = now
            batches = self._plan.state.train_cfg.eval_steps
            self._console.show(f"step {step}/{self._total}  evaluating: batch {done} of {batches}")

    def on_log(self, step: int, lr: float, values: dict[str, float]) -> None:
        """Print a log line and add a record."""
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
        """Print an evaluation and add a record; its time does not count towards the speed."""
        now = time.monotonic()
        loss = scores.val_loss
        assert loss is not None
        best = "  best so far" if scores.best_step == step else ""
        self._console.say(
            f"step {step:>6}/{self._total}  {self._val_loss} {loss:.4f} nats  "
            f"{loss / math.log(2):.4f} bits/byte{best}"
        )
        self._record("eval", step, now, {self._val_loss: loss})
        self._last_time, self._last_step = now, step

    def on_text(self, step: int, text: str) -> None:
        """Print what the model writes; its time does not count towards the speed."""
        self._console.say(f"what the model writes after step {step}:", "", *_indented(text), "")
        self._last_time, self._last_step = time.monotonic(), step

    def closing(self, state: TrainState, scores: Scores, others: Mapping[str, float]) -> None:
        """Print a summary of the run; `others` are the final losses of the other sources."""
        say, now = self._console.say, time.monotonic() - self._start
        in_all = f", {clock(self._before + now)} in all" if self._before else ""
        say(f"finished {state.step} steps in {clock(now)}{in_all}")
        if self._losses:
            say(f"training loss: first logged {self._losses[0]:.4f}, last {self._losses[-1]:.4f}")
        if scores.val_loss is not None:
            known = scores.best_step is not None  # unknown if a plain loop wrote the checkpoint
            say(
                f"validation loss ({state.train_cfg.val_source}): {scores.val_loss:.4f} nats; best "
                f"{scores.best_val_loss:.4f}"
                f"{f' after step {scores.best_step}' if known else ' before this run'}"
            )
        for name, loss in others.items():
            say(f"validation loss ({name}): {loss:.4f} nats")
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
            self._console.warn(f"{self._metrics.path}: {error.strerror}; will retry")


def _indented(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines()]
