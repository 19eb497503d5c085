"""Commands at the edges of a process: no temporary folder, closed streams, Ctrl-C."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.trained import save_lively

NO_TEMPORARY_FOLDER = """
import sys, tempfile
tempfile._candidate_tempdir_list = lambda: ["/nonexistent"]
from niels_gpt.cli import main
try:
    main(prog_name="niels-gpt")
finally:
    compiler = sorted({"torch._dynamo", "torch._inductor"} & set(sys.modules))
    sys.stderr.write("".join(f"imported {name}\\n" for name in compiler))
"""


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return save_lively(tmp_path_factory.mktemp("run") / "best.pt")


@pytest.mark.parametrize(
    "words",
    [
        "sample --ckpt best.pt --max-bytes 3",
        "sample --ckpt best.pt --max-bytes 3 -n 2",
        "chat --ckpt best.pt --max-bytes 3 --message Hi",
        "evaluate --ckpt best.pt --text best.pt --steps 1",
        "evaluate --ckpt best.pt --text text.txt --full",
        "checkpoint info best.pt",
        "checkpoint verify best.pt",
        "checkpoint diff best.pt best.pt",
        "checkpoint export best.pt model.safetensors --force",
    ],
)
def test_using_a_model_needs_no_temporary_folder_and_no_compiler(ckpt, words):
    (ckpt.parent / "text.txt").write_text("A short text of a few words. " * 9)
    result = subprocess.run(
        [sys.executable, "-c", NO_TEMPORARY_FOLDER, *words.split()],
        cwd=ckpt.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "imported" not in result.stderr
