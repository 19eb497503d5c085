"""The names of a run's files, and which files of a folder are its own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt.files.names import (
    checkpoint_files,
    periodic_files,
    run_files,
    step_name,
    step_of_name,
)

OWN = ["latest.pt", "step_12345678.pt", "step_0000001.pt", "best.pt", "metrics.jsonl"]
OTHERS = ["step_1.pt", "my.pt", "latest.pt.bak", "notes.md", "step_000000a.pt"]


@given(st.integers(0, 10**12))
def test_a_name_tells_its_step(step):
    assert step_of_name(step_name(step)) == step


@pytest.mark.parametrize("name", [*OTHERS, "latest.pt", "best.pt"])
def test_other_names_tell_none(name):
    assert step_of_name(name) is None


def test_a_runs_files_are_the_names_of_the_contract_in_order(tmp_path):
    for name in OWN + OTHERS:
        (tmp_path / name).write_bytes(b"")
    assert run_files(tmp_path) == [tmp_path / name for name in OWN]
    assert checkpoint_files(tmp_path) == [tmp_path / name for name in OWN[:-1]]
    assert periodic_files(tmp_path) == {
        12345678: tmp_path / "step_12345678.pt",
        1: tmp_path / "step_0000001.pt",
    }
