"""The runs of the scaling law: resumable, whole schedules; the fit finds the law it is shown."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks import scaling
from benchmarks.scaling import Point, Run
from niels_gpt.analysis.scaling import (
    DRAWN,
    LARGEST,
    LAW,
    REPEATS,
    Law,
    Text,
    distinct_bytes,
)
from niels_gpt.corpus import Corpus

TEXT = bytes(32 + k * k % 90 for k in range(3000))
CORPUS = Corpus(
    {"wiki": TEXT, "roam": TEXT[:1000]}, {"wiki": TEXT}, {"wiki": 0.75, "roam": 0.25}, 42, 8, 256
)
TINY = Run(32, 1, steps=2, lr=0.01, B=2)
TRUE = Law(E=0.7, A=0.25, a=0.35, B=0.9, b=0.4)
SIZES = [(N, D) for N in (25e3, 100e3, 600e3, 2e6) for D in (2.5e5, 5e5, 1e6, 2e6)]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(scaling, "EVAL", {"B": 2, "eval_steps": 1})
    monkeypatch.setattr(scaling, "open_corpus", lambda *_: CORPUS)
    monkeypatch.setattr(scaling, "rates", lambda: [TINY, TINY._replace(lr=0.02)])


def test_a_run_is_described_by_its_line(quick):
    line = scaling.carry_out(TINY, CORPUS)
    assert {field: line[field] for field in Run._fields} == TINY._asdict()
    assert line["bytes"] == 2 * 2 * 256
    assert line["text"] == {"wiki": (0.75, 3000), "roam": (0.25, 1000)}
    assert 3 < line["val_nats"] < 6


def test_a_run_depends_on_its_line_alone(quick):
    again = scaling.carry_out(TINY, CORPUS)["val_nats"]
    assert scaling.carry_out(TINY, replace(CORPUS, seed=7, B=3))["val_nats"] == again
    assert scaling.carry_out(TINY._replace(seed=1), CORPUS)["val_nats"] != again


def test_a_finished_run_is_not_run_again(quick, tmp_path):
    out, said = tmp_path / "runs.jsonl", []
    scaling.run_all([TINY], {}, out, said.append)
    scaling.run_all([TINY, TINY._replace(lr=0.02)], {}, out, said.append)
    assert [json.loads(line)["lr"] for line in said] == [0.01, 0.02]
    assert out.read_text().splitlines() == said


def test_few_unique_bytes_are_the_starts_of_all_sources():
    short = scaling.shortened(CORPUS, 800)
    assert short.train == {"wiki": TEXT[:600], "roam": TEXT[:200]}
    assert scaling.texts_of(short)["roam"] == Text(0.25, 200)


def points(noise=0.0):
    return [Point(N, D, TRUE.loss(N, D) + noise * (i % 3)) for i, (N, D) in enumerate(SIZES)]


def test_the_fit_finds_the_law_that_made_the_points():
    assert tuple(scaling.fit(points(), TRUE.E)) == pytest.approx(tuple(TRUE), rel=1e-3)


def test_one_bad_run_hardly_moves_the_fit():
    bad = points()
    bad[5] = bad[5]._replace(nats=bad[5].nats + 0.5)
    found = scaling.fit(bad, TRUE.E)
    assert found.loss(3e6, 8e6) == pytest.approx(TRUE.loss(3e6, 8e6), abs=0.01)


def test_the_draws_of_a_bootstrap_are_keyed_and_differ_in_e():
    laws = scaling.bootstrap(points(1e-3), 3)
    assert laws == scaling.bootstrap(points(1e-3), 3)
    assert tuple(law.E for law in laws) == scaling.ES


LINE = {**TINY._asdict(), "B": 8, "steps": 512, "N": 100, "bytes": 1000, "val_nats": 2.0}
LINE["text"] = {"wiki": [1.0, 5000]}


def test_of_several_rates_the_best_counts_and_seeds_count_each():
    worse = {**LINE, "lr": 0.5, "val_nats": 9.0}
    assert scaling.points_of([worse, LINE, {**LINE, "seed": 1}]) == [(100, 1000, 2.0)] * 2


@pytest.mark.parametrize("other", [{"B": 32}, {"steps": 511}, {"unique": 100}])
def test_runs_of_another_kind_are_not_fitted(other):
    assert scaling.points_of([{**LINE, **other}]) == []


def test_the_worth_of_repeated_text_is_found():
    def line(D, repeats):
        text = {"wiki": Text(1.0, 50_000)}
        nats = TRUE.loss(4e4, distinct_bytes(D, text, repeats))
        return {**LINE, "N": 4e4, "bytes": D, "unique": 50_000, "text": text, "val_nats": nats}

    lines = [line(D, 7.3) for D in (2e5, 8e5)]
    too_large = line(4e5, 1.0) | {"N": 6e4}
    assert scaling.fit_repeats([*lines, too_large, LINE], TRUE) == 7.3


def test_the_grid_has_no_run_twice_five_seeds_at_the_smallest_and_several_budgets_of_each_size():
    runs = scaling.grid()
    assert len(set(runs)) == len(runs)
    smallest = min(runs, key=scaling.cost)
    same = [run for run in runs if run._replace(seed=42) == smallest._replace(seed=42)]
    assert {run.seed for run in same} == {42, 43, 44, 45, 46}
    assert all(len({r.steps for r in runs if r.C == run.C}) > 1 for run in runs)


def test_the_constants_of_the_law_are_those_of_the_runs_in_the_repository():
    records = scaling.read_runs()
    points = scaling.points_of(records)
    law, *drawn = (scaling.fit(points, scaling.ES[0]), *scaling.bootstrap(points, 3))
    for found, constants in zip((law, *drawn), (LAW, *DRAWN[:3]), strict=True):
        assert tuple(found) == pytest.approx(tuple(constants), rel=1e-2)
    assert len(DRAWN) == scaling.DRAWS
    assert scaling.fit_repeats(records, law) == pytest.approx(REPEATS, abs=0.2)
    assert (max(p.N for p in points), max(p.D for p in points)) == LARGEST
