"""How often a fault is tried: a few times in the default run, many times in the campaign."""

import pytest


def tries(few: int, many: int) -> pytest.MarkDecorator:
    """Parametrise a test with `tries`: `few` by default, `many` under the reliability mark."""
    return pytest.mark.parametrize(
        "tries",
        [
            pytest.param(few, id="few"),
            pytest.param(many, id="many", marks=pytest.mark.reliability),
        ],
    )
