"""A run: the loop connected to the output folder, the console, the clock and signals."""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import replace
from functools import partial
from itertools import chain

from niels_gpt.corpus import Corpus
from niels_gpt.data.sources import all_places, option_of
from niels_gpt.eval import evaluate
from niels_gpt.lr_schedule import lr_of_step
from niels_gpt.mix import written
from niels_gpt.run import loop
from niels_gpt.run.compile import choose_step
from niels_gpt.run.excerpt import excerpt
from niels_gpt.run.folder import Folder
from niels_gpt.run.loop import NonFiniteError
from niels_gpt.run.options import TrainOptions
from niels_gpt.run.plan import Plan
from niels_gpt.run.progress import Console, Reporter, say_opening
from niels_gpt.run.selfcheck import check_start
from niels_gpt.run.stop import Stop, Stopped
from niels_gpt.state import TrainState
from niels_gpt.step import StepFunction, train_step


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
            if options.sample and (not options.sample_every_eval or state.step == plan.state.step):
                show(state)
    except Stopped as stopped:
        console.warn(f"stopped by {stopped}; {folder.last_good()}")
        if folder.good is not None:
            console.warn(resume_line(options, folder))
        return stopped.exit_code if folder.is_saved else 1
    except (NonFiniteError, RuntimeError, MemoryError, OSError) as error:
        console.fail(error, folder.last_good())
        return 1
    if not saved:
        console.fail("the final save failed", folder.last_good())
        return 1
    console.say(resume_line(options, folder))
    return 0


def _show_text(reporter: Reporter, console: Console, stop: Stop, state: TrainState) -> None:
    """Print what the model writes; the state has been saved, so a signal may end this at once."""
    if not console.is_read:
        return
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
        return train_step
    with contextlib.suppress(Stopped), stop.immediately():
        step, is_compiled = choose_step(state, corpus.batch(state.step, device), console.say)
        folder.environment = {**plan.environment, "compile": is_compiled}
        return step
    return train_step


def ports_of(
    plan: Plan, folder: Folder, reporter: Reporter, stop: Stop, step: StepFunction = train_step
) -> loop.Ports:
    """Connect the loop to the plan's batches and learning rates, the folder and the reporter."""
    cfg, corpus, device = plan.state.train_cfg, plan.corpus, plan.environment["device"]
    return loop.Ports(
        batch=lambda step: corpus.batch(step, device),
        lr=lambda step: lr_of_step(step, cfg),
        step=step,
        evaluate=lambda state: evaluate(state, corpus.validation, cfg.seed),
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


def resume_line(options: TrainOptions, folder: Folder) -> str:
    """Return the command that resumes from the last good checkpoint, with all that was given."""
    flags = {
        "--compile": options.compile is True,
        "--no-compile": options.compile is False,
        "--allow-data-change": options.allow_data_change,
    }
    assert folder.good is not None
    given = {
        "--config": [options.config],
        "--set": options.overrides,
        **{option_of(name): all_places(place) for name, place in options.places.items()},
        "--mix": [written(mix)] if (mix := getattr(options.places, "mix", None)) else [],
        "--device": [options.device],
        "--resume": [folder.good],
        "--out": [folder.path] if folder.good.parent != folder.path else [],
    }
    words = [
        [option, str(value)]
        for option, values in given.items()
        for value in values
        if value is not None
    ]
    words.append([flag for flag, is_given in flags.items() if is_given])
    return f"resume with: niels-gpt train {shlex.join(chain.from_iterable(words))}"
