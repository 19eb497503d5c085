"""A run: the loop connected to the output folder, the console, the clock and signals."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from functools import partial

from niels_gpt.corpus import Corpus
from niels_gpt.eval import evaluate
from niels_gpt.lr_schedule import lr_of_step
from niels_gpt.run import loop
from niels_gpt.run.compile import choose_step
from niels_gpt.run.compile_time import expected_time, remember_time
from niels_gpt.run.excerpt import excerpt
from niels_gpt.run.folder import Folder
from niels_gpt.run.loop import NonFiniteError
from niels_gpt.run.next_steps import next_steps, resume_command
from niels_gpt.run.options import TrainOptions
from niels_gpt.run.plan import Plan
from niels_gpt.run.progress import Console, Reporter, say_opening
from niels_gpt.run.selfcheck import check_start
from niels_gpt.run.stop import Stop, Stopped
from niels_gpt.state import TrainState
from niels_gpt.step import StepFunction, loop_step


def train(plan: Plan, options: TrainOptions, console: Console, stop: Stop) -> int:
    """Run the loop on a plan, reporting to the console; return the exit code."""
    say_opening(plan, console)
    folder = Folder(plan, console)
    try:
        check_start(plan, console)
        step = _step_of(plan, folder, console, stop)
        reporter = Reporter(plan, folder.metrics, console)
        show = partial(_show_text, reporter, console, stop)
        ports = ports_of(plan, folder, reporter, stop, step)
        if options.sample_every_eval:
            ports = replace(ports, show=show)
        state, scores, saved = loop.run(plan.state, plan.scores, ports)
        if saved:
            reporter.closing(state, scores, _score_others(state, plan.corpus, console, stop))
            if options.sample and reporter.text_step != state.step:
                show(state)
    except Stopped as stopped:
        console.warn(f"stopped by {stopped}; {folder.last_good()}")
        if folder.good is not None:
            console.warn(f"resume with: {resume_command(options, folder)}")
        return stopped.exit_code if folder.is_saved else 1
    except (NonFiniteError, RuntimeError, MemoryError, OSError) as error:
        console.fail(error, folder.last_good())
        return 1
    if not saved:
        console.fail("the final save failed", folder.last_good())
        return 1
    for what, command in next_steps(plan, options, folder, state):
        console.say(f"{what}:", f"  {command}")
    return 0


def _show_text(reporter: Reporter, console: Console, stop: Stop, state: TrainState) -> None:
    """Print what the model writes; the state has been saved, so a signal may end this at once."""
    if not console.is_read:
        return
    reporter.text_step = state.step
    with stop.immediately():
        try:
            text = excerpt(state)
        except (ValueError, RuntimeError, MemoryError) as error:
            console.warn(f"no sample: {error}")
            return
    reporter.on_text(state.step, text)


def _step_of(plan: Plan, folder: Folder, console: Console, stop: Stop) -> StepFunction:
    """Return the step to train with, compiled if requested; the folder records which.

    A signal ends the compilation at once; the loop then finds it, and saves.
    """
    state, corpus, device = plan.state, plan.corpus, plan.environment["device"]
    if not plan.environment["compile"] or state.step >= state.train_cfg.total_steps:
        return loop_step
    console.say(f"compiling the step: {expected_time(state)}")
    with contextlib.suppress(Stopped), stop.immediately(), console.busy("compiling the step"):
        began = time.monotonic()
        step, is_compiled = choose_step(state, corpus.batch(state.step, device), console.say)
        folder.environment = {**plan.environment, "compile": is_compiled}
        if is_compiled:
            remember_time(state, time.monotonic() - began)
        return step
    return loop_step


def ports_of(
    plan: Plan, folder: Folder, reporter: Reporter, stop: Stop, step: StepFunction = loop_step
) -> loop.Ports:
    """Connect the loop to the plan's batches and learning rates, the folder and the reporter."""
    cfg, corpus, device = plan.state.train_cfg, plan.corpus, plan.environment["device"]
    return loop.Ports(
        batch=lambda step: corpus.batch(step, device),
        lr=lambda step: lr_of_step(step, cfg),
        step=step,
        evaluate=lambda state: evaluate(
            state,
            corpus.validation,
            cfg.seed,
            on_batch=partial(reporter.on_batch, state.step),
        ),
        on_step=reporter.on_step,
        on_log=reporter.on_log,
        on_eval=reporter.on_eval,
        save=folder.save,
        check_stop=stop.check,
        may_stop=stop.immediately,
        check_each=device == "cpu",
    )


def _score_others(
    state: TrainState, corpus: Corpus, console: Console, stop: Stop
) -> dict[str, float]:
    """Return the validation loss of each source but that of every evaluation, in nats.

    It is for the reader of the log alone, so that nothing of a run depends on it.
    """
    losses: dict[str, float] = {}
    if not console.is_read:
        return losses
    with stop.immediately():
        for name, stream in corpus.val.items():
            if name != corpus.val_source:
                console.show(f"scoring the validation text of {name}")
                losses[name] = evaluate(state, stream, state.train_cfg.seed)
    return losses
