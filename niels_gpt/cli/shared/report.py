"""How commands print results with `--json`."""

import json
import math
from typing import Any

from niels_gpt.terminal import write


def print_json(value: object) -> None:
    """Print named tuples, dicts and lists as JSON; what is not finite becomes null."""
    write(json.dumps(_plain(value), ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
