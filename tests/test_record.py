"""What a run keeps in its checkpoints: read back as written, refused when it is something else."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.checkpoint import CheckpointError
from niels_gpt.record import checkpoint_extra, kept_environment, kept_scores, kept_sources
from niels_gpt.run.loop import Scores

STREAM = {"origin": "notes", "bytes": 5, "sha256": "0" * 64}
SOURCES = {"train": {"wiki": STREAM}, "val": {}}
ENVIRONMENT = {"torch": "2", "threads": 3, "compile": False}

optional_floats = st.none() | st.floats(allow_nan=False)
optional_steps = st.none() | st.integers(0, 10**9)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(optional_floats, optional_steps, optional_floats, optional_steps)
def test_what_was_kept_comes_back(best, best_step, val, val_step):
    scores = Scores(best, best_step, val, val_step)
    payload = {"best_val_loss": best, **checkpoint_extra(scores, SOURCES, ENVIRONMENT)}
    assert kept_scores(payload) == scores
    assert kept_sources(payload) == SOURCES
    assert kept_environment(payload) == ENVIRONMENT


def test_a_checkpoint_of_another_program_keeps_nothing():
    assert kept_scores({"best_val_loss": 2.0}) == Scores(2.0)
    assert kept_sources({}) is None
    assert kept_environment({}) == {}


@pytest.mark.parametrize(
    ("read", "payload", "where"),
    [
        (kept_scores, {"best_val_loss": None, "scores": "high"}, "scores"),
        (kept_scores, {"best_val_loss": None, "scores": {"val_step": "x"}}, "scores.val_step"),
        (kept_sources, {"sources": [1]}, "sources"),
        (kept_sources, {"sources": {"train": 1}}, "train"),
        (kept_sources, {"sources": {"val": {"wiki": None}}}, "wiki"),
        (kept_sources, {"sources": {"val": {"wiki": {**STREAM, "bytes": "5"}}}}, "val.wiki.bytes"),
        (kept_environment, {"environment": 1}, "environment"),
        (kept_environment, {"environment": {"threads": 0}}, "threads"),
        (kept_environment, {"environment": {"threads": "all"}}, "threads"),
    ],
)
def test_something_else_under_these_names_is_refused_by_name(read, payload, where):
    with pytest.raises(CheckpointError, match=where):
        read(payload)


@given(plain, st.sampled_from(["scores", "sources", "environment"]))
def test_nothing_plain_ends_in_another_error(value, key):
    payload = {"best_val_loss": None, key: value}
    for read in (kept_scores, kept_sources, kept_environment):
        with contextlib.suppress(CheckpointError):
            read(payload)
