"""The state shared by the tests of analyses."""

import pytest

from niels_gpt import TrainState
from tests.analysis.plain import TINY
from tests.training import trained_state


@pytest.fixture(scope="module")
def state() -> TrainState:
    return trained_state(TINY, B=4)
