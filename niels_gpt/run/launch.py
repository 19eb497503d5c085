"""Run a `train` command: check, lock the folder, run, return an exit code.

Exit codes: 0 done, 2 invalid input (nothing trained), 1 failed after that, 128 + n after signal n.
Torch is imported only after the config has been validated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from niels_gpt.config import read_config
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
                with console.busy("loading the program") as becomes:
                    plan = _prepare(options, locks, becomes)
                    if options.dry_run:
                        from niels_gpt.run.dry_run import estimate

                        becomes("measuring a few steps")
                        found = estimate(plan)
                if options.dry_run:
                    console.result(*found, as_json=options.as_json)
                    return 0
        except Stopped as stopped:
            console.warn(f"stopped by {stopped} before the first step: nothing to save")
            return stopped.exit_code
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            console.fail(error)
            return 2
        from niels_gpt.run.session import train

        return train(plan, options, console, stop)


def _prepare(
    options: TrainOptions, locks: contextlib.ExitStack, becomes: Callable[[str], None]
) -> Plan:
    """Validate the config before importing torch, so that mistakes are reported at once."""
    document = None if options.config is None else read_config(options.config)
    own = None
    if document is not None and options.parent is None:
        own = document.configs(options.overrides)
    keep_freed_memory()
    limit_threads()
    from niels_gpt.files import durable
    from niels_gpt.run.origin import check_origin, find_origin, output_folder
    from niels_gpt.run.plan import make_plan

    check_origin(options)
    out = output_folder(options)
    if options.dry_run:
        durable.check_folder(out)
    else:
        durable.make_folder(out)
        locks.enter_context(durable.lock_folder(out))
    becomes("reading the checkpoint")
    origin = find_origin(options)
    becomes("reading the text")
    model_cfg, train_cfg = own or origin.configs(document, options.overrides)
    return make_plan(model_cfg, train_cfg, options, origin, document)
