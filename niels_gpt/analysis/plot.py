"""Pictures and tables of `metrics.jsonl`: loss and learning rate of one or more runs.

Reading and tables need only the standard library; `draw` needs the extra `plot` (matplotlib).
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from niels_gpt.files.durable import write_durably
from niels_gpt.files.names import METRICS
from niels_gpt.run.metrics import Record, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTALL = 'for a picture: pip install "niels-gpt[plot]"'

# Okabe and Ito 2008, a palette for colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"

Points = list[tuple[float, float]]


class Curves(NamedTuple):
    """The series of one run; x in the unit of the axis, losses in nats per byte."""

    label: str
    train: Points
    val: Points
    lr: Points
    source: str = "wiki"  # of the validation text


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
        for field in (axis.field, "loss", "lr", _val_field(r))
        if field in r and not isinstance(r[field], int | float)
    ]:
        step, field, value = wrong[0]
        raise ValueError(f"{where}: step {step} has {field!r}: {value!r}, which is not a number")

    def points(kind: str, field_of: Callable[[Record], str]) -> Points:
        return [
            (r[axis.field] / axis.unit, r[field_of(r)])
            for r in records
            if r.get("kind") == kind and field_of(r) in r
        ]

    train, lr = points("train", lambda r: "loss"), points("train", lambda r: "lr")
    judges = [_val_field(r) for r in records if r.get("kind") == "eval"]
    source = judges[-1].removeprefix("val_").removesuffix("_loss") if judges else "wiki"
    return Curves(label, train, points("eval", _val_field), lr, source)


def _val_field(record: Record) -> str:
    """Return the field of an evaluation that has its loss, such as val_wiki_loss."""
    return next((f for f in record if f.startswith("val_") and f.endswith("_loss")), "")


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


# --- as a table --------------------------------------------------------------------------------


def table(runs: Sequence[Curves], x: str) -> list[str]:
    """Return the numbers of the picture as lines, one per logged point."""
    head = f"{X_AXES[x].label:>14}  {'lr':>9}  {'train nats':>10}  {'val nats':>8}  {'val bits':>8}"
    lines = []
    for run in runs:
        lines += [f"{run.label}", head, *(_row(*row) for row in rows(run)), ""]
    return lines[:-1]


def rows(run: Curves) -> list[tuple[float, float | None, float | None, float | None]]:
    """Return (x, lr, training loss, validation loss) sorted by x, None if not recorded."""
    lr, train, val = dict(run.lr), dict(run.train), dict(run.val)
    return [(x, lr.get(x), train.get(x), val.get(x)) for x in sorted({*lr, *train, *val})]


def _row(x: float, lr: float | None, train: float | None, val: float | None) -> str:
    place = f"{x:14,.0f}" if x == int(x) else f"{x:14,.3f}"
    cells = [
        f"{'' if value is None else format(value, spec):>{width}}"
        for value, spec, width in (
            (lr, ".3e", 9),
            (train, ".4f", 10),
            (val, ".4f", 8),
            (None if val is None else val / math.log(2), ".4f", 8),
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


def save(runs: Sequence[Curves], x: str, paths: Iterable[Path]) -> None:
    """Draw the runs into files; see `save_figure`."""
    save_figure(lambda: draw(runs, x), paths)


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


def draw(runs: Sequence[Curves], x: str) -> Figure:
    """Draw the losses of all runs above their learning rates, 8 by 5.5 inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    several = len(runs) > 1
    for number, run in enumerate(runs):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        upper.plot(
            *_xy(run.train), color=colour, alpha=0.45, lw=1.2, label="" if several else "training"
        )
        name = _legend_text(run.label) if several else f"validation ({run.source})"
        upper.plot(*_xy(run.val), color=colour, lw=2, marker=marker, ms=5, label=name)
        dashes = (6, 2 * number) if number else ()  # equal rates stay visible
        lower.plot(*_xy(run.lr), color=colour, lw=1.5, dashes=dashes)
    judges = ", ".join(dict.fromkeys(run.source for run in runs))
    upper.legend(loc="best", title=f"validation ({judges}); thin: training" if several else None)
    _label_axes(upper, lower, X_AXES[x].label)
    return figure


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
    lower.margins(x=0.02)


def _xy(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _to_bits(nats: Any) -> Any:
    return nats / math.log(2)


def _to_nats(bits: Any) -> Any:
    return bits * math.log(2)
