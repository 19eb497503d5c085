"""Hostile files: none runs, each ends in the package's own error, in bounded time and memory."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.reliability import hostile

pytestmark = pytest.mark.xdist_group("hostile")  # one process tries them all


@pytest.fixture(scope="module")
def results(request, tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    """Return the folder, and name -> outcome, message, seconds; one process tries all chosen."""
    folder = tmp_path_factory.mktemp("hostile")
    chosen = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    for name in chosen:
        hostile.build(folder, name)
    run = subprocess.run(
        [sys.executable, "-m", "tests.reliability.hostile", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    outcomes = {name: rest for name, *rest in map(json.loads, run.stdout.splitlines())}
    assert run.returncode == 0, (list(outcomes)[-1:], run.stderr[-2000:])
    assert set(outcomes) == chosen
    return folder, outcomes


@pytest.mark.parametrize("name", hostile.PATTERNS)
def test_refused_for_what_it_is(results, name):
    folder, outcomes = results
    outcome, message, _ = outcomes[name]
    assert outcome == "refused", message
    assert message.startswith(f"{folder / name}.pt: ")
    assert message.isprintable()
    assert len(message) < 600
    assert re.search(hostile.PATTERNS[name], message)


def test_nothing_was_executed(results):
    folder, _ = results
    assert len(hostile.PATTERNS) >= 30
    assert not (folder / hostile.CANARY).exists()
    assert not (ROOT / hostile.CANARY).exists()
