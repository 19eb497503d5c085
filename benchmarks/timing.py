"""Alternating timings, and the speed of the machine."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

SGEMM_SIZE = 2048


def median_seconds(
    sides: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Time the sides alternately, so that drift of the machine affects all equally."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(warmup + rounds):
        for name, side in sides.items():
            started = clock()
            side()
            if i >= warmup:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def make_sgemm() -> Callable[[], object]:
    """Return a matrix product of `sgemm_flops()` operations that allocates nothing."""
    a, b, out = (torch.randn(SGEMM_SIZE, SGEMM_SIZE) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def sgemm_flops() -> int:
    return 2 * SGEMM_SIZE**3


def describe_machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    if sys.platform == "darwin":
        name = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
        ).stdout
        return name.strip()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
