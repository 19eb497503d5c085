"""Train a small byte-level GPT: pure steps on `torch.func`, exact resume, durable checkpoints.

The names below are imported on first use, so that `import niels_gpt` alone loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from niels_gpt.config import ModelConfig, TrainConfig
    from niels_gpt.eval import evaluate
    from niels_gpt.state import TrainState, from_modules, make_state, to_modules
    from niels_gpt.step import train_step

__version__ = "0.1.0"

_HOME = {
    "ModelConfig": "config",
    "TrainConfig": "config",
    "TrainState": "state",
    "evaluate": "eval",
    "from_modules": "state",
    "make_state": "state",
    "to_modules": "state",
    "train_step": "step",
}

__all__ = [
    "ModelConfig",
    "TrainConfig",
    "TrainState",
    "evaluate",
    "from_modules",
    "make_state",
    "to_modules",
    "train_step",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"niels_gpt.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
