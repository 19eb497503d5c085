"""Train a small byte-level GPT: pure steps on `torch.func`, exact resume, durable checkpoints.

The names below are imported on first use, so that `import niels_gpt` alone loads no torch.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if sys.version_info < (3, 11):  # noqa: UP036  # in a clone, nothing has checked it before
    sys.stderr.write(
        "error: niels_gpt needs Python 3.11 or newer, and "
        f"{sys.executable} is Python {'.'.join(map(str, sys.version_info[:3]))}: "
        "use a newer one, for example from python.org\n"
    )
    raise SystemExit(2)
if sys.platform == "win32":
    sys.stderr.write("error: niels_gpt runs on macOS and Linux; on Windows, run it inside WSL\n")
    raise SystemExit(2)

if TYPE_CHECKING:
    from niels_gpt.checkpoint import load_state, save_state
    from niels_gpt.config import ModelConfig, TrainConfig
    from niels_gpt.eval import evaluate
    from niels_gpt.loss import gradients
    from niels_gpt.optim import Optimizer, update
    from niels_gpt.state import TrainState, from_modules, make_state, to_modules
    from niels_gpt.step import batch_of_step, train_step

__version__ = "0.1.0"

_HOME = {
    "ModelConfig": "config",
    "Optimizer": "optim",
    "TrainConfig": "config",
    "TrainState": "state",
    "batch_of_step": "step",
    "evaluate": "eval",
    "from_modules": "state",
    "gradients": "loss",
    "load_state": "checkpoint",
    "make_state": "state",
    "save_state": "checkpoint",
    "to_modules": "state",
    "train_step": "step",
    "update": "optim",
}

__all__ = [
    "ModelConfig",
    "Optimizer",
    "TrainConfig",
    "TrainState",
    "batch_of_step",
    "evaluate",
    "from_modules",
    "gradients",
    "load_state",
    "make_state",
    "save_state",
    "to_modules",
    "train_step",
    "update",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"niels_gpt.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
