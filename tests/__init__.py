"""The tests, in the folders of the package: `run/test_loop.py` is of `niels_gpt/run/loop.py`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the project
SHARED = ROOT.parent / "shared" / "data"  # real text, where it lies beside the project
