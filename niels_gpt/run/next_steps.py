"""The commands to go on with after a run, in the form in which this one was called."""

import shlex
from collections.abc import Collection, Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from niels_gpt.data.recipe import WITHOUT_MACHINE_LINES
from niels_gpt.data.sources import all_places, option_of
from niels_gpt.files.names import BEST
from niels_gpt.mix import written
from niels_gpt.run.folder import Folder
from niels_gpt.run.options import TrainOptions
from niels_gpt.run.plan import CHAT, NOTES, Plan
from niels_gpt.state import TrainState


class Stage(NamedTuple):
    """A second stage of training, from the weights of a finished run."""

    what: str
    config: str
    out: str  # subfolder of the run's
    more: tuple[str, ...] = ()


STAGES = {  # of a run on several texts the first of these, of one alone the last
    "text": Stage("fine-tune it on the text alone", NOTES, "text", ("--mix", "text=1")),
    "roam": Stage("fine-tune it on the notes alone", NOTES, "notes"),
    "primer": Stage("teach it to chat", CHAT, "chat", ("--mix", "primer=1")),
}
PROMPT = "The "


def resume_command(options: TrainOptions, folder: Folder) -> str:
    """Return the command that resumes from the newest good checkpoint; there must be one.

    A checkpoint of this run holds all that it was given; before the first there is one, the command
    has to give it again.
    """
    assert folder.good is not None
    words = [*options.program.train, "--resume", shown(folder.good)]
    if not folder.has_own:
        words += _given(options)
        if folder.good.parent != folder.path:
            words += ["--out", shown(folder.path)]
    return shlex.join([*words, *_display(options)])


def next_steps(
    plan: Plan, options: TrainOptions, folder: Folder, state: TrainState
) -> list[tuple[str, str]]:
    """Return what can be done with a finished run, and the command for it."""
    base, train, out = options.program.base, options.program.train, shown(folder.path)
    assert folder.good is not None
    best = folder.path / BEST
    model = shown(best if best.exists() else folder.good)
    longer = f"train.total_steps={2 * state.step}"
    steps = [
        ("continue a text", [*base, "sample", "--ckpt", model, "--prompt", PROMPT]),
        ("talk with it", [*base, "chat", "--ckpt", model]),
        ("see the losses", [*base, "plot", out]),
        ("go on longer", [*train, "--resume", shown(folder.good), "--set", longer]),
    ]
    text = _to_tune_on(plan.corpus.train)
    if text is not None:
        stage = STAGES[text]
        tuned = ["--from", model, "--out", shown(folder.path / stage.out)]
        device = [] if options.device is None else ["--device", options.device]
        places = _places({text: plan.call.places.get(text, [])})
        as_before = plan.corpus.record["train"].get(text, {}).get("origin", "")
        skip = ["--skip-machine-lines"] * as_before.endswith(WITHOUT_MACHINE_LINES)
        more = [*stage.more, *places, *skip, *device]
        words = [*train, "--config", stage.config, *tuned, *more]
        steps.append((stage.what, words))
    return [(what, shlex.join(words)) for what, words in steps]


def _to_tune_on(trained: Collection[str]) -> str | None:
    """Return a text to fine-tune on: one's own, or else the dialogues, unless that was the text."""
    if len(trained) > 1:
        return next((name for name in STAGES if name in trained), None)
    return None if "primer" in trained else "primer"


def shown(path: Path) -> str:
    """Return a path from the current folder where that is shorter."""
    try:
        here, absolute = Path.cwd(), path.absolute()
    except FileNotFoundError:  # the current folder was deleted
        return str(path)
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)


def _given(options: TrainOptions) -> list[str]:
    """Return the options that decide what a run does, as they were given."""
    given_mix = options.given.mix
    flags = {
        "--compile": options.compile is True,
        "--no-compile": options.compile is False,
        "--allow-data-change": options.allow_data_change,
        "--skip-machine-lines": options.given.skip_machine_lines is True,
        "--keep-machine-lines": options.given.skip_machine_lines is False,
    }
    given: dict[str, Iterable[object]] = {
        "--config": [options.config],
        "--set": options.overrides,
        "--mix": [written(given_mix)] if given_mix else [],
        "--device": [options.device],
    }
    pairs = [
        [option, str(value)]
        for option, values in given.items()
        for value in values
        if value is not None
    ]
    places = {
        name: [str(path) for path in all_places(place)]
        for name, place in options.given.places.items()
    }
    flagged = [flag for flag, is_given in flags.items() if is_given]
    return [*chain.from_iterable(pairs), *_places(places), *flagged]


def _display(options: TrainOptions) -> list[str]:
    """Return the options that only change what is printed, which no checkpoint holds."""
    flags = {"--no-sample": not options.sample, "--sample-every-eval": options.sample_every_eval}
    return [flag for flag, is_given in flags.items() if is_given]


def _places(places: dict[str, list[str]]) -> list[str]:
    return [
        word
        for name, paths in places.items()
        for path in paths
        for word in (option_of(name), shown(Path(path)))
    ]
