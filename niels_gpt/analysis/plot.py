"""Pictures and tables of `metrics.jsonl`: loss and learning rate of one or more runs.

Reading and tables need only the standard library; `draw` needs the extra `plot` (matplotlib).
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, starmap
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from niels_gpt.config import ModelConfig, TrainConfig
from niels_gpt.files.durable import write_durably
from niels_gpt.files.names import LATEST, METRICS
from niels_gpt.run.metrics import Record, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTALL = "for a picture: pip install matplotlib"

# Okabe and Ito 2008, a palette for colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"

STEEP = 0.1  # of the x axis: only losses after it have to fit into the picture
VALUE_WIDTH = 0.08  # of the x axis: about that of a written value
GREY = "#555555"

Points = list[tuple[float, float]]
_End = tuple[float, float, str]  # of a curve: x, y, colour


class Curves(NamedTuple):
    """The series of one run; x in the unit of the axis, losses in nats per byte."""

    label: str
    train: Points
    val: Points
    lr: Points
    source: str = "wiki"  # of the validation text
    others: Mapping[str, Points] = MappingProxyType({})  # by source: other validation texts


class AxisX(NamedTuple):
    """The x axis: the field of the records, its unit, and its label."""

    field: str
    unit: float
    label: str


X_AXES = {
    "steps": AxisX("step", 1, "steps"),
    "bytes": AxisX("bytes", 1e6, "text seen (MB)"),
    "hours": AxisX("seconds", 3600, "hours"),
}


# --- reading -----------------------------------------------------------------------------------


def read_curves(path: Path, x: str = "steps", label: str | None = None) -> Curves:
    """Read the log of a run, or of the run in a folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it has no records, or they lack the field for `x`.
    """
    file = metrics_file(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; a training run writes it beside its checkpoints"
        )
    records = read_metrics(file)
    if not records:
        raise ValueError(f"{file}: has no records of a training run")
    return curves(records, x, label or run_name(file), where=str(file))


def metrics_file(path: Path) -> Path:
    """Return the log of the run in a folder, or the file that is given itself."""
    return path / METRICS if path.is_dir() else path


def curves(records: Iterable[Record], x: str, label: str, *, where: str = "the log") -> Curves:
    """Group records into series.

    Raises:
        ValueError: if a record lacks the field for `x`, or a value is not a number.
    """
    axis = X_AXES[x]
    records = list(records)
    if lacking := [r for r in records if axis.field not in r]:
        raise ValueError(f"{where}: step {lacking[0]['step']} has no {axis.field!r}, for --x {x}")

    if wrong := [
        (r["step"], field, r[field])
        for r in records
        for field in (axis.field, "loss", "lr", *_val_fields(r))
        if field in r and not isinstance(r[field], int | float)
    ]:
        step, field, value = wrong[0]
        raise ValueError(f"{where}: step {step} has {field!r}: {value!r}, which is not a number")

    def points(kind: str, field: str) -> Points:
        return [
            (r[axis.field] / axis.unit, r[field])
            for r in records
            if r.get("kind") == kind and field in r
        ]

    fields = dict.fromkeys(field for r in records for field in _val_fields(r))
    vals = {field[len("val_") : -len("_loss")]: points("eval", field) for field in fields}
    judges = [own[0] for r in records if (own := _val_fields(r))]
    source = judges[-1][len("val_") : -len("_loss")] if judges else "wiki"
    val = vals.pop(source, [])
    return Curves(label, points("train", "loss"), val, points("train", "lr"), source, vals)


def _val_fields(record: Record) -> list[str]:
    """Return the fields with the loss of a validation text, that of every evaluation first."""
    return [field for field in record if field.startswith("val_") and field.endswith("_loss")]


def run_name(file: Path) -> str:
    """Return the name of a run: its folder's, or its file's unless that is metrics.jsonl."""
    return file.absolute().parent.name if file.name == METRICS else file.stem


def distinct_labels(labels: Sequence[str]) -> list[str]:
    """Number labels that occur more than once."""
    seen: dict[str, int] = {}
    distinct = []
    for label in labels:
        seen[label] = number = seen.get(label, 0) + 1
        distinct.append(f"{label} ({number})" if labels.count(label) > 1 else label)
    return distinct


def facts_of(path: Path) -> list[str]:
    """Return lines on the config, model and text of a run, from its folder; none without one."""
    from niels_gpt.checkpoint import read_checkpoint
    from niels_gpt.run.call import read_call

    file = metrics_file(path)
    if file.name != METRICS:
        return []  # a copy, away from its run
    try:
        found = read_checkpoint(file.with_name(LATEST))
        config = read_call(file.parent)[0].config
        named = [f"config {Path(config).stem}"] if config else []
        return [*named, *facts(*found.configs, (found.sources or {}).get("train", ()))]
    except (ValueError, OSError):
        return []


def facts(model: ModelConfig, train: TrainConfig, sources: Iterable[str]) -> list[str]:
    """Return lines on a model and on the text that it is trained on."""
    from niels_gpt.model.flops import parameter_count

    shares = {name: train.p_train.get(name, 0.0) for name in sources}
    whole = sum(shares.values()) or 1.0
    largest = sorted(shares.items(), key=lambda item: -item[1])
    text = ", ".join(f"{name} {share / whole:.0%}" for name, share in largest if share)
    return [
        f"{parameter_count(model):,} parameters: {model.L} blocks of width {model.C}, context "
        f"{model.T}; {train.optimizer}, {train.total_steps:,} steps of {train.B} rows",
        *([f"text: {text}"] if text else []),
    ]


def title_of(runs: Sequence[Path], labels: Sequence[str]) -> list[str]:
    """Return the lines of a title: the names of the runs, and the facts that all share."""
    first, *others = map(facts_of, runs)
    shared = [line for line in first if all(line in facts for facts in others)]
    return [labels[0] if not others else f"{len(labels)} runs", *shared]


# --- as a table --------------------------------------------------------------------------------


def table(runs: Sequence[Curves], x: str) -> list[str]:
    """Return the numbers of the picture as lines, one per logged point."""
    head = f"{X_AXES[x].label:>14}  {'lr':>9}  {'train nats':>10}  {'val nats':>8}  {'val bits':>8}"
    lines = []
    for run in runs:
        columns = [f"  {f'{source} nats':>12}" for source in run.others]
        lines += [run.label, head + "".join(columns), *starmap(_row, rows(run)), ""]
    return lines[:-1]


def rows(run: Curves) -> list[tuple[float, list[float | None]]]:
    """Return x, and learning rate, training loss, validation loss and those of other sources.

    Sorted by x; None is what is not recorded.
    """
    series = [dict(points) for points in (run.lr, run.train, run.val, *run.others.values())]
    return [(x, [known.get(x) for known in series]) for x in sorted({*chain(*series)})]


def _row(x: float, values: list[float | None]) -> str:
    lr, train, val, *others = values
    place = f"{x:14,.0f}" if x == int(x) else f"{x:14,.3f}"
    cells = [
        f"{'' if value is None else format(value, spec):>{width}}"
        for value, spec, width in (
            (lr, ".3e", 9),
            (train, ".4f", 10),
            (val, ".4f", 8),
            (None if val is None else val / math.log(2), ".4f", 8),
            *((other, ".4f", 12) for other in others),
        )
    ]
    return "  ".join([place, *cells]).rstrip()


# --- as a picture ------------------------------------------------------------------------------


def have_matplotlib() -> bool:
    """Import matplotlib; return whether it is installed.

    Pictures are only saved, so the user's MPLBACKEND does not matter, not even an unknown one.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return True


def save(
    runs: Sequence[Curves],
    x: str,
    paths: Iterable[Path],
    *,
    title: Sequence[str] = (),
    whole: bool = False,
) -> None:
    """Draw the runs into files; see `draw` and `save_figure`."""
    save_figure(lambda: draw(runs, x, title=title, whole=whole), paths)


def default_pictures(runs: Sequence[Path]) -> list[Path]:
    """Return where the picture of these runs goes: beside the log, or above several folders."""
    folders = [metrics_file(path).absolute().parent for path in runs]
    folder = Path(os.path.commonpath(folders))
    return [folder / "loss.png", folder / "loss.svg"]


def check_paths(paths: Iterable[Path]) -> None:
    """Raise ValueError unless every path ends in .png or .svg."""
    if wrong := [path for path in paths if path.suffix not in (".png", ".svg")]:
        raise ValueError(f"{wrong[0]}: a picture must be .png or .svg")


def check_pictures(paths: Iterable[Path]) -> None:
    """Raise ValueError unless pictures can be saved at these paths."""
    paths = list(paths)
    check_paths(paths)
    if lost := [path for path in paths if not path.parent.is_dir()]:
        raise ValueError(f"{lost[0]}: folder not found: {lost[0].parent}")
    if paths and not have_matplotlib():
        raise ValueError(f"{paths[0]}: a picture needs matplotlib; {INSTALL}")


def save_figure(draw: Callable[[], Figure], paths: Iterable[Path]) -> None:
    """Draw into files in this project's style; the same figure gives the same bytes.

    The user's matplotlibrc has no effect. Each file is written whole or not at all.

    Raises:
        ValueError: for a suffix other than .png and .svg, or if matplotlib is not installed.
        OSError: if a file cannot be written.
    """
    paths = list(paths)
    check_pictures(paths)
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        warnings.filterwarnings("ignore", message="Glyph")  # letters that the font lacks
        figure = draw()
        pictures = [_rendered(figure, path.suffix[1:]) for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        write_durably([path], picture)


def _rendered(figure: Figure, kind: str) -> bytes:
    """Return a picture as the bytes of a file, "png" or "svg", without a date or version."""
    picture = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(picture, format=kind, metadata=metadata)
    return picture.getvalue()


_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "savefig.facecolor": "white",
    "svg.hashsalt": "niels_gpt",
}


def draw(
    runs: Sequence[Curves], x: str, *, title: Sequence[str] = (), whole: bool = False
) -> Figure:
    """Draw the losses of all runs above their learning rates, 8 by 5.5 inches.

    Args:
        title: its lines, the first one bold.
        whole: show also the steep start, which is cut off where it would flatten all else.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    several = len(runs) > 1
    ends = [_draw_run(upper, lower, run, n, several=several) for n, run in enumerate(runs)]
    _limit_axes(upper, lower, runs, whole=whole)
    _write_values(upper, [end for losses, _ in ends for end in losses], "{:.3f}", 0.05)
    rates = [end for _, own in ends for end in own]
    if several and len({rate for _, rate, _ in rates}) == 1:
        rates = [(*max(rates)[:2], GREY)]
    _write_values(lower, rates, "{:.2g}", 0.16)
    judges = ", ".join(dict.fromkeys(run.source for run in runs))
    heading = f"validation ({judges}); thin: training" if several else None
    upper.legend(loc="best", title=heading)
    _label_axes(upper, lower, X_AXES[x].label)
    if title:
        write_title(figure, upper, title)
    return figure


def _draw_run(
    upper: Axes, lower: Axes, run: Curves, number: int, *, several: bool
) -> tuple[list[_End], list[_End]]:
    """Draw a run; return the ends of its losses and of its rates that are worth a figure."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    thin = "" if several else "training"
    upper.plot(*_xy(run.train), color=colour, alpha=0.45, lw=1.2, label=thin)
    name = _legend_text(run.label) if several else f"validation ({run.source})"
    upper.plot(*_xy(run.val), color=colour, lw=2, marker=marker, ms=5, label=name)
    ends = [(run.val, colour), *([] if several else [(run.train, colour)])]
    for place, (source, points) in enumerate(run.others.items(), 1):
        own = colour if several else COLOURS[place % len(COLOURS)]
        label = "" if several else f"validation ({source})"
        mark = MARKERS[place % len(MARKERS)]
        upper.plot(*_xy(points), color=own, lw=1.2, ls="--", marker=mark, ms=4, label=label)
        ends += [] if several else [(points, own)]
    dashes = (6, 2 * number) if number else ()  # equal rates stay visible
    lower.plot(*_xy(run.lr), color=colour, lw=1.5, dashes=dashes)
    losses = [(*points[-1], own) for points, own in ends if points]
    return losses, [(*run.lr[-1], colour)] if run.lr else []


def _limit_axes(upper: Axes, lower: Axes, runs: Sequence[Curves], *, whole: bool) -> None:
    """Leave room for the last values, and cut off a steep start."""
    curves = [c for run in runs for c in (run.train, run.val, *run.others.values())]
    losses = [point for curve in curves for point in curve]
    if not losses:
        return
    first, last = min(losses)[0], max(losses)[0]
    span = last - first or 1.0
    lower.set_xlim(first - 0.02 * span, last + 0.1 * span)
    low, high = loss_range(losses, whole=whole)
    upper.set_ylim(low, high)
    if (highest := max(y for _, y in losses)) > high:
        seen = min(x for x, y in losses if y <= high)
        axes_x, text = upper.get_xaxis_transform(), f"from {highest:.2f}"
        upper.text(seen + 0.02 * span, 0.98, text, transform=axes_x, va="top", size=9, color=GREY)


def loss_range(losses: Points, *, whole: bool) -> tuple[float, float]:
    """Return the limits of the y axis: of all losses, or of those after the steep start.

    It is cut off if it takes more than a third of the height.
    """
    first, last = min(losses)[0], max(losses)[0]
    low, high = min(y for _, y in losses), max(y for _, y in losses)
    late = max(y for x, y in losses if x >= first + STEEP * (last - first))
    top = late if not whole and high - low > 1.5 * (late - low) and late > low else high
    margin = 0.06 * (top - low) or 0.1
    return low - margin, top + margin


def _write_values(axes: Axes, ends: Sequence[_End], style: str, gap: float) -> None:
    """Write the last value of each curve at its end; neighbours are `gap` of the height apart."""
    from matplotlib.patheffects import withStroke

    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    room = gap * (high - low)
    for group in neighbours(ends, VALUE_WIDTH * (right - left)):
        places = apart([y for _, y, _ in group], room, floor=low + room / 2)
        for (x, y, colour), place in zip(group, places, strict=True):
            axes.annotate(
                style.format(y),
                (x, place),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                size=10,
                color=colour,
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )


def neighbours(ends: Sequence[_End], width: float) -> list[list[_End]]:
    """Group the ends of curves: in a group, each is less than `width` to the right of the last."""
    groups: list[list[_End]] = []
    for end in sorted(ends, key=lambda end: end[0]):
        if groups and end[0] - groups[-1][-1][0] < width:
            groups[-1].append(end)
        else:
            groups.append([end])
    return groups


def apart(values: Sequence[float], gap: float, floor: float = -math.inf) -> list[float]:
    """Return the closest numbers in the same order, at least `gap` apart and not below `floor`.

    Least squares, by pooling neighbours (Ayer et al. 1955), of the values less their ranks' gaps.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    pools: list[tuple[float, int]] = []  # mean, count
    for rank, i in enumerate(order):
        mean, count = values[i] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            before, n = pools.pop()
            mean, count = (mean * count + before * n) / (count + n), count + n
        pools.append((mean, count))
    means = [max(mean, floor) for mean, count in pools for _ in range(count)]
    found = {i: means[rank] + rank * gap for rank, i in enumerate(order)}
    return [found[i] for i in range(len(values))]


def write_title(figure: Figure, axes: Axes, lines: Sequence[str]) -> None:
    """Write a title over a figure, at the left: a bold line, and smaller ones over the axes."""
    name, *others = map(_legend_text, lines)
    figure.suptitle(name, x=0.01, ha="left", weight="bold", size=12)
    axes.set_title("\n".join(others), loc="left", size=9, color=GREY)


def _legend_text(label: str) -> str:
    """Keep matplotlib from hiding labels that start with _ and reading $ as mathematics."""
    return (" " + label if label.startswith("_") else label).replace("$", r"\$")


def _label_axes(upper: Axes, lower: Axes, x_label: str) -> None:
    upper.set_ylabel("loss (nats per byte)")
    bits = upper.secondary_yaxis("right", functions=(_to_bits, _to_nats))
    bits.set_ylabel("bits per byte")
    lower.set_ylabel("learning rate")
    lower.set_xlabel(x_label)
    lower.set_ylim(bottom=0)
    lower.locator_params(axis="y", nbins=4)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)


def _xy(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _to_bits(nats: Any) -> Any:
    return nats / math.log(2)


def _to_nats(bits: Any) -> Any:
    return bits * math.log(2)
