"""The `selfcheck` command: whether this machine computes what a run relies on."""

from __future__ import annotations

import platform
import sys
from typing import TYPE_CHECKING

import click

from niels_gpt.cli.shared.options import HELP, device_option, json_option
from niels_gpt.cli.shared.output import console, exit_on_failure

if TYPE_CHECKING:
    from niels_gpt.run.selfcheck import Check


@click.command(context_settings=HELP, epilog="Example: niels-gpt selfcheck --device mps")
@device_option()
@json_option()
def main(device: str, as_json: bool) -> None:
    """Check whether a device computes what a run relies on.

    Takes the same steps twice, which must give the same bits, and compares dropout masks, batches,
    gradients, losses and the next byte with the CPU. Trains a small model of its own, reads and
    writes no file, and takes seconds. Exits with 1 if something differs.
    """
    with exit_on_failure(1):
        import torch

        from niels_gpt.run.selfcheck import selfcheck

        found: list[Check] = []
        for check in selfcheck(device):
            found.append(check)
            console.show(check.name)
    passed = all(check.passed for check in found)
    machine = {"torch": torch.__version__, "platform": platform.platform()}
    value = {"device": device, **machine, "passed": passed, "checks": found}
    console.result(value, _lines(device, machine, found), as_json=as_json)
    sys.exit(0 if passed else 1)


def _lines(device: str, machine: dict[str, str], found: list[Check]) -> list[str]:
    width = max(len(check.name) for check in found)
    failed = sum(not check.passed for check in found)
    return [
        f"{device}, torch {machine['torch']}, {machine['platform']}",
        *(f"{'ok' if c.passed else 'FAILED':<6}  {c.name:<{width}}  {c.found}" for c in found),
        f"{device}: {failed} of {len(found)} checks failed: train with --device cpu, and report it"
        if failed
        else f"{device}: as it should be",
    ]
