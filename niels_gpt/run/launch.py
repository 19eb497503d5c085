"""Run a `train` command: check, lock the folder, run, return an exit code.

Exit codes: 0 done, 2 invalid input (nothing trained), 1 failed after that, 128 + n after signal n.
Torch is imported only after the config has been validated.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from niels_gpt.config import find_config, load_config_from_json
from niels_gpt.device import keep_freed_memory, limit_threads
from niels_gpt.run.options import TrainOptions
from niels_gpt.run.stop import Stop, Stopped

if TYPE_CHECKING:
    from niels_gpt.run.plan import Plan
    from niels_gpt.run.progress import Console


def run_command(options: TrainOptions, console: Console) -> int:
    """Run the command, reporting to the console; return the exit code."""
    stop = Stop()
    with stop.active(), contextlib.ExitStack() as locks:
        try:
            with stop.immediately():
                plan = _prepare(options, locks)
                if options.dry_run:
                    from niels_gpt.run.dry_run import estimate

                    console.result(*estimate(plan), as_json=options.as_json)
                    return 0
        except Stopped as stopped:
            console.warn(f"stopped by {stopped} before the first step: nothing to save")
            return stopped.exit_code
        except (ValueError, OSError, RuntimeError) as error:
            console.fail(error)
            return 2
        from niels_gpt.run.session import train

        return train(plan, options, console, stop)


def _prepare(options: TrainOptions, locks: contextlib.ExitStack) -> Plan:
    """Validate the config before importing torch, so that mistakes are reported at once."""
    model_cfg, train_cfg = load_config_from_json(find_config(options.config), options.overrides)
    keep_freed_memory()
    limit_threads()
    from niels_gpt.files import durable
    from niels_gpt.run.plan import make_plan, output_folder

    if options.resume not in (None, "latest") and not os.path.exists(options.resume):
        raise FileNotFoundError(f"--resume {options.resume}: no such checkpoint")
    if options.resume is not None and os.path.isdir(options.resume) and options.resume != "latest":
        raise ValueError(
            f"--resume {options.resume}: is a folder; use "
            f"--resume latest --out {options.resume} for the newest good checkpoint in it"
        )
    out = output_folder(options)
    if options.resume == "latest" and not out.is_dir():
        raise FileNotFoundError(f"--resume latest: folder not found: {out}")
    if options.dry_run:
        durable.check_folder(out)
    else:
        durable.make_folder(out)
        locks.enter_context(durable.lock_folder(out))
    return make_plan(model_cfg, train_cfg, options)
