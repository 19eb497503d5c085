"""Everything that can be found wrong before the first step, found before the first step.

`make_plan` turns what the user asked for into what the loop needs. It writes nothing but the cache
of built streams, and every error that it raises is the user's to mend.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from niels_gpt import paths
from niels_gpt.checkpoint import (
    METRICS,
    load_checkpoint,
    newest_good,
    resume_notes,
    state_from_payload,
)
from niels_gpt.config import ModelConfig, TrainConfig, to_dict
from niels_gpt.corpus import Corpus, open_corpus
from niels_gpt.device import resolve_device
from niels_gpt.model.flops import step_flops
from niels_gpt.record import kept_environment, kept_scores, kept_sources
from niels_gpt.run.loop import Scores
from niels_gpt.run.metrics import Record, read_metrics, records_until
from niels_gpt.run.options import TrainOptions
from niels_gpt.state import TrainState, make_state
from niels_gpt.streams import locate

COMPILE_FLOPS = 1e14  # a run of so many is compiled by default: about 20 minutes on two cores


class Resume(NamedTuple):
    """Where a run goes on from."""

    path: Path
    payload: dict[str, Any]
    skipped: list[tuple[Path, str]]  # damaged checkpoints that `latest` passed over


class Plan(NamedTuple):
    """What the loop needs, checked."""

    state: TrainState
    scores: Scores
    records: list[Record]  # metrics up to the state
    out: Path
    corpus: Corpus
    environment: dict[str, Any]  # what else can change bits
    why_compile: str  # why the step is compiled, or is not
    resumed: Resume | None
    messages: list[str]  # for the user


def make_plan(model_cfg: ModelConfig, train_cfg: TrainConfig, options: TrainOptions) -> Plan:
    """Check and load everything that a run needs.

    Raises:
        ValueError, RuntimeError, OSError: with what is wrong; nothing was changed.
    """
    device = resolve_device(options.device)
    resumed, messages = None, []
    if options.resume is None:
        state, scores = make_state(model_cfg, train_cfg, device), Scores()
    else:
        resumed = find_resume(options.resume, output_folder(options))
        state, scores = resume_state(resumed.payload, model_cfg, train_cfg, device)
        messages += resume_warnings(resumed, train_cfg)
    where = locate(options.places, write_cache=not options.dry_run)
    corpus = open_corpus(model_cfg, train_cfg, where)
    inherited = kept_environment(resumed.payload).get("compile", False) if resumed else None
    compiled, why = choose_compile(options.compile, inherited, device, model_cfg, train_cfg)
    environment = describe_environment(device, compiled)
    records: list[Record] = []
    if resumed is not None:
        if changes := data_changes(resumed.payload, corpus.record):
            _refuse_unless(options.allow_data_change, resumed.path, changes)
            messages += changes
        messages += environment_changes(resumed.payload, environment)
        metrics = read_metrics(resumed.path.with_name(METRICS))
        records = records_until(metrics, state.step, scores.val_step)
    return Plan(
        state=state,
        scores=scores,
        records=records,
        out=output_folder(options),
        corpus=corpus,
        environment=environment,
        why_compile=why,
        resumed=resumed,
        messages=[*messages, *corpus.messages],
    )


def output_folder(options: TrainOptions) -> Path:
    """Return where checkpoints go: as asked, else beside the checkpoint that is resumed."""
    if options.out is not None:
        return options.out
    if options.resume in (None, "latest"):
        return paths.CHECKPOINT_DIR
    return Path(options.resume).parent


def find_resume(name: str, folder: Path) -> Resume:
    """Load the checkpoint to go on from: a path, or `latest` for the newest good one of a folder.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if the file named is not good.
    """
    if name != "latest":
        return Resume(Path(name), load_checkpoint(name, device="cpu"), [])
    found, skipped = newest_good(folder)
    if found is None:
        why = "".join(f"; {path.name}: {reason}" for path, reason in skipped)
        raise FileNotFoundError(f"--resume latest: no good checkpoint in {folder}{why}")
    return Resume(found, load_checkpoint(found, device="cpu"), skipped)


def resume_state(
    payload: dict[str, Any], model_cfg: ModelConfig, train_cfg: TrainConfig, device: str
) -> tuple[TrainState, Scores]:
    """Return the state and scores of a checkpoint; ValueError if its model has another shape."""
    state = state_from_payload(payload, model_cfg, train_cfg, device)
    return state, kept_scores(payload)


def describe_environment(device: str, compiled: bool) -> dict[str, Any]:
    """Return what, besides config and data, can change the bits of a run."""
    return {
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "compile": compiled,
    }


def resume_warnings(resumed: Resume, train_cfg: TrainConfig) -> list[str]:
    """Say what was passed over, what cannot be carried on exactly, and which settings changed."""
    before, now = resumed.payload["train_cfg"], to_dict(train_cfg)
    changed = [
        f"train.{name}: {before[name]!r} in the checkpoint, now {now[name]!r}"
        for name in now
        if name in before and before[name] != now[name]
    ]
    return [
        *(f"{path}: skipped, {why}" for path, why in resumed.skipped),
        *(f"{resumed.path}: {note}" for note in resume_notes(resumed.payload)),
        *changed,
    ]


def data_changes(payload: Mapping[str, Any], sources: Mapping[str, Any]) -> list[str]:
    """Return a line for each stream that is not the one that the checkpoint was trained on."""
    before = kept_sources(payload)
    if before is None:
        return []
    return [
        f"{split}/{name}: {_stream_line(before[split].get(name))} in the checkpoint, "
        f"now {_stream_line(sources[split].get(name))}"
        for split in ("train", "val")
        for name in sorted({*before[split], *sources[split]})
        if before[split].get(name, {}).get("sha256") != sources[split].get(name, {}).get("sha256")
    ]


def environment_changes(payload: Mapping[str, Any], environment: Mapping[str, Any]) -> list[str]:
    """Return a line for each condition, other than data, under which the bits may differ."""
    before = kept_environment(payload) or environment
    return [
        f"{name}: {before.get(name)!r} in the checkpoint, now {value!r}: "
        "the result may differ from the uninterrupted run's in the last bits"
        for name, value in environment.items()
        if before.get(name) != value
    ]


def _stream_line(info: Mapping[str, Any] | None) -> str:
    if info is None:
        return "absent"
    return f"{info['origin']}, {info['bytes']:,} bytes, sha256 {info['sha256'][:12]}"


def _refuse_unless(allowed: bool, path: Path, changes: list[str]) -> None:
    if not allowed:
        lines = "".join(f"\n  {line}" for line in changes)
        raise ValueError(
            f"{path}: the text is not the one that this run was trained on:{lines}\n"
            "give the same text, or --allow-data-change to go on with the new one"
        )


def choose_compile(
    asked: bool | None,
    inherited: bool | None,
    device: str,
    model_cfg: ModelConfig,
    cfg: TrainConfig,
) -> tuple[bool, str]:
    """Choose whether to compile: as asked, else as the run resumed, else where it pays back.

    Compiling takes a minute or two, and spares about a sixth of the time of a step on a CPU. On
    MPS compiled models have gone wrong, so not there. Also returns the reason.
    """
    if asked is not None:
        return asked, "as asked"
    if inherited is not None:
        return inherited, "as the run that is resumed"
    if device != "cpu":
        return False, f"not by default on {device}"
    flops = cfg.total_steps * step_flops(model_cfg, B=cfg.B)
    if flops < COMPILE_FLOPS:
        return False, "too short a run to pay back"
    if shutil.which("c++") is None:
        return False, "there is no C++ compiler"
    return True, "a run long enough to pay back"
