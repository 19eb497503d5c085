"""Curves out of `metrics.jsonl`: every record in its place, as table, JSON and picture."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt import ModelConfig, TrainConfig, make_state
from niels_gpt.analysis import plot
from niels_gpt.analysis.plot import Curves, curves, distinct_labels, read_curves, rows, table
from niels_gpt.checkpoint import checkpoint_of, write_checkpoint
from niels_gpt.run.call import Call


def train_record(step, loss=2.0, lr=1e-4):
    clock = {"seconds": 1.8 * step, "bytes_per_s": 4000}
    return {"kind": "train", "step": step, "bytes": 8192 * step, "loss": loss, "lr": lr, **clock}


def eval_record(step, loss=2.1):
    return {
        "kind": "eval",
        "step": step,
        "bytes": 8192 * step,
        "val_wiki_loss": loss,
        "seconds": 1.8 * step,
    }


RECORDS = [train_record(1, 5.5, 0.0), train_record(2000, 2.0), eval_record(2000)]


@pytest.fixture
def log(tmp_path):
    def write(folder, records):
        path = tmp_path / folder / "metrics.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return path

    return write


@pytest.mark.parametrize(
    ("x", "first", "second"),
    [("steps", 1, 2000), ("bytes", 0.008192, 16.384), ("hours", 1.8 / 3600, 1.0)],
)
def test_records_go_to_their_series_in_the_unit_of_the_axis(x, first, second):
    run = curves(RECORDS, x, "run")
    assert run.train == [(pytest.approx(first), 5.5), (pytest.approx(second), 2.0)]
    assert run.val == [(pytest.approx(second), 2.1)]
    assert run.lr == [(pytest.approx(first), 0.0), (pytest.approx(second), 1e-4)]


def test_a_log_without_the_field_of_the_axis_is_refused():
    records = [{k: v for k, v in r.items() if k != "bytes"} for r in RECORDS]
    assert curves(records, "steps", "run").val
    with pytest.raises(ValueError, match=r"the log: step 1 has no 'bytes', for --x bytes"):
        curves(records, "bytes", "run")


def test_a_run_is_named_by_its_folder_or_its_file(log, tmp_path):
    path = log("wider", RECORDS)
    assert read_curves(path).label == read_curves(path.parent).label == "wider"
    other = path.rename(tmp_path / "smoke.jsonl")
    assert read_curves(other).label == "smoke"


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=6))
def test_labels_become_distinct_and_keep_their_names(labels):
    new = distinct_labels(labels)
    assert len(set(new)) == len(labels)
    for label, old in zip(new, labels, strict=True):
        assert label == old or (labels.count(old) > 1 and re.fullmatch(rf"{old} \(\d\)", label))


@given(st.sets(st.integers(1, 500)), st.sets(st.integers(1, 500)))
def test_the_table_has_every_point_once_in_order(trained, evaluated):
    records = [train_record(s, loss=s / 7) for s in trained]
    records += [eval_record(s, loss=s / 11) for s in evaluated]
    run = curves(records, "steps", "run")
    found = rows(run)
    assert [x for x, _ in found] == sorted(trained | evaluated)
    assert {x for x, (_, loss, _) in found if loss is not None} == trained
    seen = {x: loss for x, (_, _, loss) in found if loss is not None}
    assert seen == {s: s / 11 for s in evaluated}
    assert len(table([run], "steps")) == 2 + len(found)


def test_the_table_has_the_losses_of_the_source_that_judged_before():
    """A run that was resumed with another `val_source`."""
    first = {"kind": "eval", "step": 1, "val_wiki_loss": 3.0}
    run = curves([first, {"kind": "eval", "step": 2, "val_text_loss": 2.0}], "steps", "run")
    head, *lines = table([run], "steps")[1:]
    assert head.split()[-2:] == ["wiki", "nats"]
    assert [line.split() for line in lines] == [["1", "3.0000"], ["2", "2.0000", "2.8854"]]


def test_the_table_gives_nats_and_bits():
    line = table([curves([eval_record(200, math.log(2))], "steps", "run")], "steps")[-1]
    assert line.split() == ["200", "0.6931", "1.0000"]


@pytest.mark.parametrize(
    ("content", "message"), [("", "has no records"), ("not json\n", "has no records")]
)
def test_a_log_without_records_is_told(niels, tmp_path, content, message):
    (tmp_path / "metrics.jsonl").write_text(content)
    result = niels("plot", tmp_path)
    assert result.exit_code == 2
    assert message in result.stderr
    assert str(tmp_path / "metrics.jsonl") in result.stderr
    missing = niels("plot", tmp_path / "absent.jsonl")
    assert missing.exit_code == 2
    assert "absent.jsonl: no such file" in missing.stderr


@pytest.mark.parametrize("field", ["bytes", "loss", "lr"])
def test_a_log_with_something_else_than_numbers_is_refused(niels, log, field):
    path = log("a", [{**RECORDS[0], field: "many"}])
    result = niels("plot", path, "--x", "bytes", "--table")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{path}: step 1 has {field!r}: 'many', which is not a number" in result.stderr


def test_json_is_the_numbers(niels, log):
    result = niels("plot", log("a", RECORDS), log("b", RECORDS[:1]), "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert [run["label"] for run in found] == ["a", "b"]
    assert found[0]["val"] == [[2000.0, 2.1]]
    assert found[1]["train"] == [[1.0, 5.5]]


def test_without_matplotlib_the_numbers_come_as_a_table(niels, log, tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "have_matplotlib", lambda: False)
    result = niels("plot", log("a", RECORDS))
    assert result.exit_code == 0
    assert result.stdout.splitlines() == table([curves(RECORDS, "steps", "a")], "steps")
    assert result.stderr.strip() == "for a picture: pip install matplotlib"
    assert not [*tmp_path.glob("loss.*")]
    asked = niels("plot", log("a", RECORDS), "--table")
    assert (asked.stdout, asked.stderr) == (result.stdout, "")


# --- pictures ----------------------------------------------------------------------------------


@pytest.fixture
def needs_matplotlib():
    return pytest.importorskip("matplotlib", reason="pictures need the extra `plot`")


def overlaps(boxes):
    return [(i, j) for i, a in enumerate(boxes) for j, b in enumerate(boxes[:i]) if a.overlaps(b)]


def visible_ticks(axis, coordinate):
    low, high = axis.get_view_interval()
    labels = axis.get_ticklabels()
    return [t for t in labels if low <= t.get_position()[coordinate] <= high and t.get_text()]


def runs(n):
    return [curves(RECORDS, "steps", f"a rather long name of run {i}") for i in range(n)]


@pytest.mark.usefixtures("needs_matplotlib")
def test_pictures_are_the_same_bytes_each_time(niels, log, tmp_path):
    path = log("a", RECORDS)
    result = niels("plot", path)
    assert result.exit_code == 0, result.stderr
    beside = [tmp_path / "a" / name for name in ("loss.png", "loss.svg")]
    assert result.stdout.splitlines() == [*map(str, beside)]
    assert not [*tmp_path.glob("loss.*")]
    first = [file.read_bytes() for file in beside]
    assert first[0].startswith(b"\x89PNG")
    assert b"<svg" in first[1]
    niels("plot", path.parent)
    assert [file.read_bytes() for file in beside] == first
    niels("plot", path, log("b", RECORDS))
    assert (tmp_path / "loss.png").exists()  # beside both


@pytest.mark.usefixtures("needs_matplotlib")
def test_the_settings_of_the_user_change_no_picture(niels_process, log, tmp_path):
    path = log("a", RECORDS)
    (tmp_path / "mine").write_text(
        "axes.facecolor: red\nfont.family: monospace\ntext.usetex: True\nsvg.fonttype: none\n"
        "savefig.bbox: tight\nlines.antialiased: False\nfigure.dpi: 30\n"
    )
    theirs = {"MPLBACKEND": "nonsense", "MATPLOTLIBRC": str(tmp_path / "mine")}
    pictures = []
    for environment in ({"MPLBACKEND": "agg"}, theirs):
        result = niels_process("plot", path, **environment)
        assert result.returncode == 0, result.stderr
        pictures.append([(tmp_path / "a" / f"loss.{kind}").read_bytes() for kind in ("png", "svg")])
    assert pictures[0] == pictures[1]


def test_a_picture_of_another_kind_is_refused(niels, log, tmp_path):
    result = niels("plot", log("a", RECORDS), "--out", "good.png", "--out", "loss.pdf")
    assert result.exit_code == 2
    assert "loss.pdf: a picture must be .png or .svg" in result.stderr
    assert not (tmp_path / "good.png").exists()


@pytest.mark.usefixtures("needs_matplotlib")
def test_a_folder_that_is_not_there_is_told(niels, log):
    assert niels("plot", log("a", RECORDS), "--out", "absent/loss.png").exit_code == 2


@pytest.mark.usefixtures("needs_matplotlib")
@pytest.mark.parametrize("n", [1, 3])
def test_the_picture_says_what_it_shows_and_nothing_overlaps(n):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = plot.draw(runs(n), "steps", title=["a run", "of a model", "on a text"])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    upper, lower = figure.axes
    assert upper.get_ylabel() == "loss (nats per byte)"
    assert upper.child_axes[0].get_ylabel() == "bits per byte"
    assert (lower.get_ylabel(), lower.get_xlabel()) == ("learning rate", "steps")
    legend = [text.get_text() for text in upper.get_legend().get_texts()]
    expected = ["training", "validation (wiki)"] if n == 1 else [r.label for r in runs(n)]
    assert legend == expected
    texts = [
        upper.yaxis.label,
        lower.yaxis.label,
        lower.xaxis.label,
        upper.child_axes[0].yaxis.label,
    ]
    texts += [*visible_ticks(upper.yaxis, 1), *visible_ticks(lower.yaxis, 1)]
    texts += [*visible_ticks(lower.xaxis, 0), figure.texts[0], upper._left_title, *lower.texts]
    texts += [text for text in upper.texts if not text.get_text().startswith("from ")]
    assert [text.get_text() for text in (figure.texts[0], upper._left_title)] == [
        *("a run", "of a model\non a text")
    ]
    boxes = [t.get_window_extent() for t in texts] + [upper.get_legend().get_window_extent()]
    assert not overlaps(boxes)
    assert all(figure.bbox.containsx(b.x0) and figure.bbox.containsx(b.x1) for b in boxes)


@pytest.mark.usefixtures("needs_matplotlib")
def test_each_curve_has_its_last_value_at_its_end():
    records = [*RECORDS, eval_record(3000, 1.9), {**eval_record(3500, 1.8), "val_roam_loss": 2.5}]
    upper, lower = plot.draw([curves(records, "steps", "run")], "steps").axes
    values = [text for text in [*upper.texts, *lower.texts] if hasattr(text, "xy")]
    found = {text.get_text(): text.xy[0] for text in values}
    assert found == {"2.000": 2000, "1.800": 3500, "2.500": 3500, "0.0001": 2000}
    assert [text.get_text() for text in upper.texts if text not in values] == ["from 5.50"]
    labels = [text.get_text() for text in upper.get_legend().get_texts()]
    assert labels == ["training", "validation (wiki)", "validation (roam)"]


@given(st.lists(st.floats(-10, 10), max_size=8), st.floats(0.001, 3))
def test_values_are_written_apart_in_their_order_and_near_their_places(values, gap):
    places = plot.apart(values, gap)
    assert sum(places) == pytest.approx(sum(values) if places else 0, abs=1e-6)
    assert all(place >= 1 - 1e-6 for place in plot.apart(values, gap, floor=1))
    order = sorted(range(len(values)), key=values.__getitem__)
    for i, j in pairwise(order):
        assert places[j] - places[i] >= gap - 1e-6
    if all(values[j] - values[i] > gap for i, j in pairwise(order)):
        assert places == pytest.approx(values)


@given(st.lists(st.floats(0, 10), max_size=8), st.floats(0.01, 3))
def test_only_values_side_by_side_are_kept_apart(xs, width):
    groups = plot.neighbours([(x, 0.0, "") for x in xs], width)
    assert [x for group in groups for x, _, _ in group] == sorted(xs)
    assert all(b[0] - a[0] < width for group in groups for a, b in pairwise(group))
    assert all(right[0][0] - left[-1][0] >= width for left, right in pairwise(groups))


losses = st.lists(st.floats(0.5, 20), min_size=2, max_size=30)


@given(losses)
def test_only_a_steep_start_is_cut_off(ys):
    points = [*enumerate(ys)]
    low, high = plot.loss_range(points, whole=False)
    late = [y for x, y in points if x >= 0.1 * (len(ys) - 1)]
    assert low < min(ys)
    assert high > max(late)
    assert high >= max(ys) or max(ys) - min(ys) > 1.5 * (max(late) - min(ys))
    assert plot.loss_range(points, whole=True)[1] > max(ys)


def test_the_title_tells_config_model_and_text_where_the_checkpoint_is(log, tmp_path):
    path = log("a", RECORDS)
    assert plot.title_of([path], ["a"]) == ["a"]
    state = make_state(ModelConfig(T=8, C=8, L=3, H=2, d_ff=8), TrainConfig(B=4, total_steps=90))
    one = {"origin": "folder", "bytes": 9, "sha256": "0"}
    sources = {"train": {"wiki": one, "roam": one}, "val": {"wiki": one}}
    write_checkpoint([tmp_path / "a" / "latest.pt"], checkpoint_of(state, sources=sources))
    count = sum(p.numel() for p in state.params.values())
    facts = [
        f"{count:,} parameters: 3 blocks of width 8, context 8; adamw, 90 steps of 4 rows",
        "text: wiki 80%, roam 20%",
    ]
    assert plot.title_of([path], ["a"]) == ["a", *facts]
    copy = path.with_name("old.jsonl")
    copy.write_bytes(path.read_bytes())
    assert plot.title_of([copy], ["old"]) == ["old"]
    assert plot.title_of([path, path], ["a (1)", "a (2)"]) == ["2 runs", *facts]
    assert plot.title_of([path, copy], ["a", "old"]) == ["2 runs"]
    Call(config="/somewhere/mine.json").write(path.parent)
    assert plot.title_of([path], ["a"]) == ["a", "config mine", *facts]


@pytest.mark.usefixtures("needs_matplotlib")
def test_names_of_folders_are_shown_as_they_are(tmp_path):
    names = ("_old", "a$b$c", "\N{CJK UNIFIED IDEOGRAPH-65E5}")
    named = [run._replace(label=name) for run, name in zip(runs(3), names, strict=True)]
    legend = plot.draw(named, "steps").axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [" _old", r"a\$b\$c", names[2]]
    plot.save(named, "steps", [tmp_path / "loss.png"])  # warnings are errors here


@pytest.mark.usefixtures("needs_matplotlib")
def test_each_point_is_drawn():
    figure = plot.draw(
        [Curves("run", [(1, 5.0), (2, 4.0)], [(2, 4.5)], [(1, 0.0), (2, 1.0)])], "steps"
    )
    upper, lower = figure.axes
    drawn = [line.get_xydata().tolist() for line in [*upper.lines, *lower.lines]]
    assert drawn == [[[1, 5], [2, 4]], [[2, 4.5]], [[1, 0], [2, 1]]]
