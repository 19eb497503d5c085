"""All checks that can be made before the first step.

`make_plan` turns the user's options into what the loop needs. It writes only the cache of built
streams, and every error that it raises is about the user's input.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from niels_gpt.checkpoint import Ancestor, Checkpoint, SourceRecords
from niels_gpt.config import ConfigDocument, ModelConfig, Problems, TrainConfig
from niels_gpt.corpus import Corpus, open_corpus
from niels_gpt.eval import Scores
from niels_gpt.files.names import METRICS
from niels_gpt.files.torchfile import MAX_TENSOR_BYTES
from niels_gpt.lr_schedule import lr_of_step
from niels_gpt.mix import may_choose_val, with_mix
from niels_gpt.model.flops import parameter_count, step_flops
from niels_gpt.optim import optimizer_of, to_entries
from niels_gpt.run.best import resumed_scores
from niels_gpt.run.call import Call, call_of, gives_shares, recall, without_what_is_gone
from niels_gpt.run.metrics import Record, damage_in, read_metrics, records_until
from niels_gpt.run.options import TrainOptions
from niels_gpt.run.origin import Origin, find_origin, output_folder
from niels_gpt.schema import parameter_shapes
from niels_gpt.state import TrainState
from niels_gpt.streams import as_recorded, locate

NOTES, CHAT = SECOND_STAGES = ("notes", "chat")  # configs for `--from`
COMPILE_FLOPS = 1e14  # compile longer runs by default: about 20 minutes on two cores


class Plan(NamedTuple):
    """Everything the loop needs, validated."""

    state: TrainState
    scores: Scores
    has_best: bool  # whether the best.pt in `out` is that of the scores
    records: list[Record]  # metrics up to the state
    out: Path
    corpus: Corpus
    environment: dict[str, Any]  # other conditions that can change bits
    why_compile: str  # why the step is compiled or not
    resumed: Checkpoint | None
    ancestors: tuple[Ancestor, ...]  # where the first weights come from
    call: Call  # how the run is called, to be kept beside its checkpoints
    messages: list[str]  # for the user


def make_plan(
    model_cfg: ModelConfig,
    train_cfg: TrainConfig,
    options: TrainOptions,
    origin: Origin | None = None,
    document: ConfigDocument | None = None,
) -> Plan:
    """Validate and load everything that a run needs.

    Args:
        model_cfg, train_cfg: what the options say, but for the shares of the text.
        origin: that of the options, if it is open.
        document: what the configs are from; None if they are a checkpoint's.

    Raises:
        ValueError, RuntimeError, OSError: for invalid input; nothing was changed.
    """
    _check_size(model_cfg, train_cfg)
    origin = origin or find_origin(options)
    device, (before, unread) = origin.device(options.device), origin.read_call()
    resumed, recalled = origin.resumed, recall(options.given, before)
    if document is None:  # a checkpoint has the shares of its run
        train_cfg, shares, any_val = with_mix(train_cfg, options.given), options.given, False
    else:
        shares = options.given if gives_shares(options, before, document) else recalled
        train_cfg = with_mix(train_cfg, shares)
        any_val = may_choose_val(train_cfg, recalled, document, options.overrides)
    given = replace(recalled, mix=shares.mix)
    given = without_what_is_gone(given, before, _needed(train_cfg, resumed, any_val))
    options = replace(options, given=given)
    state = origin.state(model_cfg, train_cfg, device)
    state, corpus = _open_text(state, options, resumed, any_val=any_val)
    inherited = inherited_compile(resumed.environment, device) if resumed else None
    compiled, why = choose_compile(options.compile, inherited, device, model_cfg, train_cfg)
    environment = describe_environment(device, compiled)
    scores, has_best, records, told = _past(resumed, options, corpus, environment)
    told = [*origin.messages(state.train_cfg), *unread, *told, *schedule_messages(train_cfg)]
    if options.config in SECOND_STAGES and origin == Origin():
        told.append(f"{options.config} is a second stage: --from CHECKPOINT begins with a model")
    return Plan(
        state=state,
        scores=scores,
        has_best=has_best,
        records=records,
        out=output_folder(options),
        corpus=corpus,
        environment=environment,
        why_compile=why,
        resumed=resumed,
        ancestors=origin.ancestors,
        call=call_of(options, before),
        messages=[*told, *corpus.messages],
    )


def _needed(cfg: TrainConfig, resumed: Checkpoint | None, any_val: bool) -> set[str]:
    """Return the sources without which a run cannot go on: those with a share, and the judge."""
    judge = (resumed.val_source if resumed else None) if any_val else cfg.val_source
    return {name for name, share in cfg.p_train.items() if share > 0} | {str(judge)}


def _open_text(
    state: TrainState, options: TrainOptions, resumed: Checkpoint | None, *, any_val: bool
) -> tuple[TrainState, Corpus]:
    """Open the text of a run; return its state with the `val_source` that it has, and the text.

    With `any_val` that is the source of the resumed run, or else one that the text suggests.
    """
    cfg, where = state.train_cfg, locate(options.given, write_cache=not options.dry_run)
    if resumed is not None:
        where = as_recorded(where, resumed.sources)
        cfg = replace(cfg, val_source=resumed.val_source if any_val else cfg.val_source)
    where = replace(where, any_val=any_val and resumed is None)
    corpus = open_corpus(state.model_cfg, cfg, where)
    return state._replace(train_cfg=replace(cfg, val_source=corpus.val_source)), corpus


def _past(
    resumed: Checkpoint | None,
    options: TrainOptions,
    corpus: Corpus,
    environment: Mapping[str, Any],
) -> tuple[Scores, bool, list[Record], list[str]]:
    """Return the scores and records to continue, whether `best.pt` is there, and messages.

    Raises:
        ValueError: if the text is not that of the checkpoint, unless that is allowed.
    """
    if resumed is None:
        return Scores(), False, [], []
    changes = data_changes(resumed.sources, corpus.record)
    if changes:
        _refuse_unless(options.allow_data_change, resumed.path, changes)
    scores, has_best, told = resumed_scores(
        resumed, output_folder(options), corpus.record, corpus.val_source
    )
    logged = resumed.path.with_name(METRICS)
    records = records_until(read_metrics(logged), resumed.step, resumed.scores.val_step)
    changes += environment_changes(resumed.environment, environment)
    return scores, has_best, records, [*changes, *told, *damage_in(logged)]


def _check_size(model_cfg: ModelConfig, train_cfg: TrainConfig) -> None:
    """Refuse a model whose checkpoints would be too large to be loaded, before it is made."""
    shapes = parameter_shapes(model_cfg)
    params = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    entries = to_entries(optimizer_of(train_cfg).init(params), params, 1)
    trees = [params, *entries.values()]
    size = sum(t.nbytes for tree in trees for t in tree.values())
    if size > MAX_TENSOR_BYTES:
        raise ValueError(
            f"the model is too large: with {parameter_count(model_cfg):,} parameters, a checkpoint"
            f" would take {size:,} bytes, and {MAX_TENSOR_BYTES:,} can be loaded"
        )


def describe_environment(device: str, compiled: bool) -> dict[str, Any]:
    """Return the conditions, besides config and data, that can change the bits of a run."""
    return {
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "compile": compiled,
    }


def schedule_messages(cfg: TrainConfig) -> list[str]:
    """Return a message if the warmup does not end before the run does."""
    if cfg.warmup_steps < cfg.total_steps:
        return []
    last = lr_of_step(cfg.total_steps - 1, cfg)
    return [
        f"train.warmup_steps={cfg.warmup_steps} is not below train.total_steps={cfg.total_steps}: "
        f"the learning rate only rises to {last:.3g} and does not reach base_lr={cfg.base_lr:.3g}"
    ]


def data_changes(before: SourceRecords | None, sources: SourceRecords) -> list[str]:
    """Return a line for each stream that differs from the checkpoint's."""
    if before is None:
        return []
    return [
        f"{split}/{name}: {_stream_line(before[split].get(name))} in the checkpoint, "
        f"now {_stream_line(sources[split].get(name))}"
        for split in ("train", "val")
        for name in sorted({*before[split], *sources[split]})
        if before[split].get(name, {}).get("sha256") != sources[split].get(name, {}).get("sha256")
    ]


def environment_changes(before: Mapping[str, Any], environment: Mapping[str, Any]) -> list[str]:
    """Return a line for each changed condition, other than data, that may change bits."""
    before = before or environment
    return [
        f"{name}: {before.get(name)!r} in the checkpoint, now {value!r}: "
        "the result may differ from an uninterrupted run in the last bits"
        for name, value in environment.items()
        if _first_device(before.get(name)) != _first_device(value)
    ]


def _first_device(value: Any) -> Any:
    """Return "mps" for "mps:0", which is the same device, and other values as they are."""
    return value.removesuffix(":0") if isinstance(value, str) else value


def _stream_line(info: Mapping[str, Any] | None) -> str:
    if info is None:
        return "absent"
    return f"{info['origin']}, {info['bytes']:,} bytes, sha256 {info['sha256'][:12]}"


def _refuse_unless(allowed: bool, path: Path, changes: list[str]) -> None:
    if not allowed:
        raise Problems(
            f"{path}: the text differs from the text of this run:",
            *changes,
            "give the same text, or use --allow-data-change to continue with the new text",
        )


def inherited_compile(before: Mapping[str, Any], device: str) -> bool | None:
    """Return whether the resumed run is compiled; None if it was on another device."""
    if _first_device(before.get("device", device)) != _first_device(device):
        return None
    return bool(before.get("compile", False))


def choose_compile(
    asked: bool | None,
    inherited: bool | None,
    device: str,
    model_cfg: ModelConfig,
    cfg: TrainConfig,
) -> tuple[bool, str]:
    """Choose whether to compile: as requested, else as in the resumed run, else if it pays off.

    Compiling takes half a minute and saves about a tenth of the time of a step on a CPU. On MPS
    it is off by default, because compiled models have given wrong results there. Also returns the
    reason.
    """
    if asked is not None:
        return asked, "as requested"
    if inherited is not None:
        return inherited, "as in the resumed run"
    if device != "cpu":
        return False, f"not by default on {device}"
    flops = cfg.total_steps * step_flops(model_cfg, B=cfg.B)
    if flops < COMPILE_FLOPS:
        return False, "the run is too short to benefit"
    if shutil.which("c++") is None:
        return False, "no C++ compiler was found"
    return True, "the run is long enough to benefit"
