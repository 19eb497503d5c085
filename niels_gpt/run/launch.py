"""Run a `train` command: check, lock the folder, run, return an exit code.

Exit codes: 0 done, 2 invalid input (nothing trained), 1 failed after that, 128 + n after signal n.
Torch is imported only after the config has been validated.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from niels_gpt.config import ModelConfig, TrainConfig, find_config, load_config_from_json
from niels_gpt.device import keep_freed_memory, limit_threads
from niels_gpt.mix import may_choose_val, with_mix
from niels_gpt.run.options import TrainOptions
from niels_gpt.run.stop import Stop, Stopped

if TYPE_CHECKING:
    from niels_gpt.run.origin import Origin
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
    own = None if options.parent else _configs(options)
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
    origin = find_origin(options)
    model_cfg, train_cfg = own or _configs(options, origin)
    path = find_config(options.config)
    any_val = may_choose_val(train_cfg, options.places, path, options.overrides)
    return make_plan(model_cfg, train_cfg, options, origin, any_val=any_val)


def _configs(
    options: TrainOptions, origin: Origin | None = None
) -> tuple[ModelConfig, TrainConfig]:
    """Load the configs; with `--from`, the model's missing values are those of its checkpoint."""
    model = origin.parent.model_cfg if origin and origin.parent else {}
    path = find_config(options.config)
    model_cfg, train_cfg = load_config_from_json(path, options.overrides, model=model)
    return model_cfg, with_mix(train_cfg, options.places)
