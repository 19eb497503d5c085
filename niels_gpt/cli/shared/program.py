"""The words with which this program was called, so that a command that it prints can be pasted."""

import os
import shutil
import sys
from pathlib import Path

from niels_gpt.run.options import Program

MODULE = "niels_gpt"


def this_program() -> Program:
    """Return how this process was called: as `train`, `.venv/bin/train`, `python -m ...`.

    Another program's process, such as a test's, gets the names of the installed commands.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name.partition(".")[0] == MODULE:
        python = (sys.orig_argv[0] or sys.executable, "-m")
        alone = spec.name == f"{MODULE}.train"
        return Program(
            (*python, MODULE), (*python, spec.name) if alone else (*python, MODULE, "train")
        )
    script = Path(sys.argv[0])
    if script.name not in ("train", "niels-gpt"):
        return Program()
    group = script.with_name("niels-gpt")
    base = (_word(group),) if group.exists() else (sys.executable, "-m", MODULE)
    return Program(base, (_word(script),) if script.name == "train" else (*base, "train"))


def _word(script: Path) -> str:
    """Return a script's name if the shell finds it by that, else its path."""
    found = shutil.which(script.name)
    return script.name if found and os.path.samefile(found, script) else str(script)
