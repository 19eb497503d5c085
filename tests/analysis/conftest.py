"""The state that the tests of figures share."""

import pytest

from niels_gpt import TrainState
from tests.analysis.plain import TINY
from tests.training import trained_state


@pytest.fixture(scope="module")
def state() -> TrainState:
    return trained_state(TINY, B=4)
