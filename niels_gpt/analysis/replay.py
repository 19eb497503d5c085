"""Repeat steps of a run, to compare every bit or to look inside one step.

Step N is the N-th update, as in the log: it leads from the state after N - 1 updates to the state
after N.
"""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from niels_gpt.analysis.lineage import find_parent, is_parent, told_of
from niels_gpt.checkpoint import Checkpoint, open_checkpoint, read_checkpoint
from niels_gpt.config import ModelConfig, Problems
from niels_gpt.corpus import Corpus, advance, next_batch, open_corpus
from niels_gpt.device import resolve_device
from niels_gpt.files.names import BEST, LATEST, METRICS, checkpoint_files, periodic_files
from niels_gpt.files.torchfile import CheckpointError
from niels_gpt.loss import gradients, row_blocks, row_losses
from niels_gpt.lr_schedule import lr_of_step
from niels_gpt.model.gpt import without_storage
from niels_gpt.optim.clip import clip_by_global_norm
from niels_gpt.optim.trees import Tree, bits, same_bits
from niels_gpt.run.compile import compile_step
from niels_gpt.run.metrics import Record, damage_in, read_metrics
from niels_gpt.run.plan import data_changes, describe_environment, environment_changes
from niels_gpt.state import TrainState, make_state
from niels_gpt.step import StepFunction, dropout_of_step, loop_step
from niels_gpt.streams import StreamBuildConfig, as_recorded

OnStep = Callable[[int], object]  # called with the number of finished updates


def step_of(checkpoint: Checkpoint) -> StepFunction:
    """Return the step function of a run, compiled if the checkpoint says so."""
    return compile_step() if checkpoint.environment.get("compile") else loop_step


# --- two states, bit by bit --------------------------------------------------------------------


class Difference(NamedTuple):
    """A tensor whose bits differ between two states, and where it differs most."""

    tensor: str  # its tree ("params" or one of the optimizer's) and its name
    elements: int  # how many differ
    place: tuple[int, ...]
    here: float  # the value at `place`
    there: float
    size: float  # |here - there|; infinite if either is NaN


def differences(here: TrainState, there: TrainState) -> list[Difference]:
    """Compare all trees of two states of the same shape; [] if all bits are equal."""
    others = there.trees()
    return [
        _difference(f"{kind} {name}", a, others[kind][name])
        for kind, tree in here.trees().items()
        for name, a in tree.items()
        if not same_bits(a, others[kind][name])
    ]


def _difference(tensor: str, a: Tensor, b: Tensor) -> Difference:
    differ = bits(a) != bits(b)
    size = (a - b).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).where(differ, -1.0)
    flat = int(size.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), a.shape))
    return Difference(
        tensor, int(differ.sum()), index, a[index].item(), b[index].item(), size[index].item()
    )


# --- repeating part of a run -------------------------------------------------------------------


class Verdict(NamedTuple):
    """The result of repeating steps of a run."""

    identical: bool
    same: int  # the last step known to be bit-identical: the start, or a saved one
    agreed: int  # the last step whose state gave the logged loss; at least `same`
    differs: int | None  # the first step known to differ
    saved: str  # the saved state compared last
    differences: list[Difference]  # from that state, in the order of the model
    messages: list[str]


def replay(
    state: TrainState,
    end: Checkpoint,
    corpus: Corpus,
    between: Mapping[int, Path],
    logged: Mapping[int, Record],
    *,
    on_step: OnStep = lambda step: None,
) -> Verdict:
    """Run from a state to a later one, `end`, or to the first saved state that differs.

    Each state needs the ones before it, so there is one forward pass, which compares every saved
    state and every logged loss on the way.

    Args:
        corpus: the text of the run, verified.
        between: checkpoints of the run by step, after `state` and before `end`.
        logged: the train records of `metrics.jsonl` by step.
    """
    saved, step = {**between, end.step: end.path}, step_of(end)
    known = _Known(state.step, state.step, None)
    messages: list[str] = []
    while True:
        if path := saved.get(state.step):
            there, why = _witness(path, state, end)
            if there is None:
                messages.append(f"{path.name} was skipped: {why}")
            elif found := differences(state, there):
                differs = known.first_difference(state.step)
                return Verdict(False, known.same, known.agreed, differs, path.name, found, messages)
            else:
                if known.doubt is not None:
                    messages.append(f"{METRICS} does not match the run of {path.name}")
                known = _Known(state.step, state.step, None)
        if state.step == end.step:
            return Verdict(True, known.same, known.agreed, None, end.path.name, [], messages)
        state, metrics = advance(state, corpus, step)
        on_step(state.step)
        if state.step in logged:
            known = known.with_record(state.step, _unlike(metrics, logged[state.step]))


class _Known(NamedTuple):
    """The range of steps in which the first difference lies, if there is one.

    A matching loss proves less than a matching state: it may round away the last bits of a weight,
    and does not depend on the optimizer's state.
    """

    same: int  # as in `Verdict`
    agreed: int
    doubt: int | None  # the first step whose record differs

    def with_record(self, step: int, wrong: list[str]) -> "_Known":
        """Add the metrics of a step that differ from its record; the first doubt counts."""
        if self.doubt is not None:
            return self
        if "loss" in wrong:  # the loss of a step is that of the state before it
            return self._replace(doubt=step - 1)
        return self._replace(agreed=step - 1, doubt=step if wrong else None)

    def first_difference(self, saved: int) -> int:
        """Return the first step known to differ, if the state saved after step `saved` does."""
        return saved if self.doubt is None else max(self.doubt, self.agreed + 1)


def _witness(path: Path, state: TrainState, end: Checkpoint) -> tuple[TrainState | None, str]:
    """Return a saved state to compare with, or None and the reason if it cannot be used."""
    if state.step == end.step:
        return end.state, ""
    try:
        found = read_checkpoint(path, state.device)
        there = found.state
    except ValueError as error:
        return None, str(error)
    if found.ancestors != end.ancestors:
        return None, "it is of another run"
    if there[-2:] == state[-2:]:
        return there, ""
    return None, "it has another config"


def _unlike(metrics: Mapping[str, Tensor], record: Record) -> list[str]:
    """Return the names of metrics whose values differ from a record's."""
    return [n for n in metrics if n in record and metrics[n].item() != record[n]]


def replay_files(
    start: Path | None, end: Path, sources: StreamBuildConfig, device: str | None, on_step: OnStep
) -> Verdict:
    """Run from one checkpoint (None: from the initial state) to another and compare.

    The steps use the config and the text of the later one.

    Raises:
        ValueError, OSError: if the two are from different runs or the text differs.
    """
    last = to_device(open_checkpoint(end), device)
    state, begin = first_state(last) if start is None else _state_in(start, last)
    if state.step > last.step:
        raise ValueError(f"{start} is after {end}: step {state.step}, not before {last.step}")
    between = {
        step: path
        for folder in (*([start.parent] if start and not begin else []), end.parent)
        for step, path in periodic_files(folder).items()
        if state.step < step < last.step
    }
    metrics = end.with_name(METRICS)
    logged = {r["step"]: r for r in read_metrics(metrics) if r["kind"] == "train"}
    corpus, messages = open_corpus_of(last, sources)
    messages = [*begin, *messages, *use_threads_of(last), *damage_in(metrics)]
    verdict = replay(state, last, corpus, between, logged, on_step=on_step)
    return verdict._replace(messages=messages + verdict.messages)


def _state_in(start: Path, last: Checkpoint) -> tuple[TrainState, list[str]]:
    """Return the state of a checkpoint of a run, or the first one if the run began with it."""
    found = open_checkpoint(start, last.state.device)
    if is_parent(found, last):
        return found.start_under(*last.configs), [told_of(found)]
    if found.ancestors != last.ancestors:
        raise ValueError(f"{start} is not of the run of {last.path}: their first weights differ")
    return found.state_under(*last.configs), []


def first_state(checkpoint: Checkpoint) -> tuple[TrainState, list[str]]:
    """Return the initial state of the run of a checkpoint, and messages.

    Raises:
        FileNotFoundError: if it began with the weights of a checkpoint that is not found.
    """
    configs, device = checkpoint.configs, checkpoint.state.device
    if not checkpoint.ancestors:
        return make_state(*configs, device), []
    parent = find_parent(checkpoint)
    return parent.on(device).start_under(*configs), [told_of(parent)]


def to_device(checkpoint: Checkpoint, device: str | None) -> Checkpoint:
    """Move a checkpoint to a device; by default to that of its run, or to the CPU without it."""
    if device is None:
        try:
            device = resolve_device(str(checkpoint.environment.get("device", "cpu")))
        except ValueError:
            device = "cpu"
    return checkpoint.on(device)


def open_corpus_of(checkpoint: Checkpoint, sources: StreamBuildConfig) -> tuple[Corpus, list[str]]:
    """Open the text of a checkpoint; return messages too.

    Raises:
        ValueError: if a stream differs from the checkpoint's digest.
    """
    path = checkpoint.path
    corpus = open_corpus(*checkpoint.configs, as_recorded(sources, checkpoint.sources))
    if changes := data_changes(checkpoint.sources, corpus.record):
        raise Problems(f"{path}: the text differs from the text it was trained on:", *changes)
    if checkpoint.sources is None:
        return corpus, [*corpus.messages, f"{path.name} has no digests: the text is not verified"]
    return corpus, [*corpus.messages]


def use_threads_of(checkpoint: Checkpoint) -> list[str]:
    """Use as many threads as the run did, and return what else differs from its environment."""
    environment = checkpoint.environment
    torch.set_num_threads(environment.get("threads", torch.get_num_threads()))
    device = str(checkpoint.state.device)
    now = describe_environment(device, environment.get("compile", False))
    return environment_changes(environment, now)


# --- inside one step ---------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of a batch."""

    source: str
    start: int  # offset in the source
    loss: float  # nats, mean over its positions, with the dropout of the step
    text: str


class StepView(NamedTuple):
    """The inside of a step: its inputs, and the size of everything on the way."""

    step: int
    lr: float
    loss: float  # nats
    grad_norm: float  # before clipping
    clip: float  # factor applied to the gradients
    rows: list[Row]
    grad_norms: dict[str, float]  # by parameter, before clipping
    activations: dict[str, float]  # largest magnitude of each module's output, in calling order


def view_step(state: TrainState, corpus: Corpus) -> StepView:
    """Return a view of a run's next step, without taking it."""
    params, cfg = state.params, state.model_cfg
    batch = next_batch(state, corpus)
    rows = range(len(batch[0]))
    drop = dropout_of_step(state.train_cfg.seed, state.step, rows, cfg, batch[0].device)
    grads, loss = gradients(params, batch, cfg, drop)
    _, grad_norm = clip_by_global_norm(grads, state.train_cfg.grad_clip)
    blocks = row_blocks(batch, drop)
    with torch.no_grad():
        losses = torch.cat([row_losses(params, block, cfg, keys) for block, keys in blocks])
    return StepView(
        step=state.step + 1,
        lr=lr_of_step(state.step, state.train_cfg),
        loss=loss.item(),
        grad_norm=grad_norm.item(),
        clip=(state.train_cfg.grad_clip / (grad_norm + 1e-6)).clamp(max=1.0).item(),
        rows=[
            Row(row.source, row.start, loss, row.text)
            for row, loss in zip(corpus.rows(state.step), losses.tolist(), strict=True)
        ],
        grad_norms={name: g.norm().item() for name, g in grads.items()},
        activations=largest_activations(params, batch[0], cfg, drop),
    )


def largest_activations(
    params: Tree, x: Tensor, cfg: ModelConfig, drop: Tensor | None
) -> dict[str, float]:
    """Return the largest magnitude in each module's output, in calling order; NaN if any is NaN."""
    largest: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            largest.setdefault(name, []).append(output.abs().amax())

        return hook

    model = without_storage(cfg).eval()
    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(watch(name))
    with torch.no_grad():
        for (block, _), keys in row_blocks((x, x), drop):
            functional_call(model, params, (block,), {"drop": keys}, strict=True)
    return {name: torch.stack(values).amax().item() for name, values in largest.items()}


# --- from a folder -----------------------------------------------------------------------------


def view_files(
    start: Path, step: int, sources: StreamBuildConfig, device: str | None, on_step: OnStep
) -> tuple[StepView, str, list[str]]:
    """Return a view of step `step` of the run of a checkpoint, or of a folder of them.

    Starts at the nearest earlier checkpoint, or at the initial state, under the config and on the
    text of the first checkpoint that is not earlier: a run that was extended took the step under
    those. Also returns the name of the start, and messages.

    Raises:
        ValueError, OSError: if there is no such step or checkpoint, or the text differs.
    """
    before, after = _around(start, step) if start.is_dir() else (open_checkpoint(start),) * 2
    if before is not None and before.step >= step:
        raise ValueError(f"{start} is after step {before.step}, too late for step {step}")
    run = to_device(after, device)
    total = run.configs[1].total_steps
    if not 1 <= step <= total:
        raise ValueError(f"--step {step}: the run of {run.path} has steps 1 to {total}")
    state, begin, told = _state_before(before, run)
    corpus, messages = open_corpus_of(run, sources)
    messages += use_threads_of(run)
    update = step_of(run)
    while state.step < step - 1:
        state, _ = advance(state, corpus, update)
        on_step(state.step)
    return view_step(state, corpus), begin, [*told, *messages]


def _state_before(before: Checkpoint | None, run: Checkpoint) -> tuple[TrainState, str, list[str]]:
    """Return the state of a checkpoint, or else the initial one, under the configs of a run.

    Also returns the name of what that is, and messages.
    """
    if before is None:
        state, told = first_state(run)
        return state, "the initial state", told
    state, begin = before.on(run.state.device).state_under(*run.configs), before.path.name
    if before.train_cfg == run.train_cfg:
        return state, begin, []
    return state, begin, [f"the config changed after {begin}: using that of {run.path.name}"]


def _around(folder: Path, step: int) -> tuple[Checkpoint | None, Checkpoint]:
    """Open the last checkpoint before a step, and the first one after it, or else that one again.

    The first is None where there is none before the step.
    """
    steps = {path: number for number, path in periodic_files(folder).items()}
    opened: dict[Path, Checkpoint] = {}  # their names do not give a step
    for path in (path for path in checkpoint_files(folder) if path.name in (LATEST, BEST)):
        with contextlib.suppress(CheckpointError):
            opened[path] = read_checkpoint(path)
            steps[path] = opened[path].step
    if not steps:
        raise FileNotFoundError(f"{folder}: no checkpoint in this folder")
    ordered = sorted(steps, key=steps.__getitem__)
    before = [path for path in ordered if steps[path] < step]
    after = [path for path in ordered if steps[path] >= step]

    def opening(path: Path) -> Checkpoint:
        return opened.get(path) or open_checkpoint(path)

    first = opening(before[-1]) if before else None
    if after:
        return first, opening(after[0])
    assert first is not None
    return first, first
