"""The device of a run, and what this process may use of the machine: memory and processors.

Torch is imported only when needed.
"""

import contextlib
import ctypes
import math
import os
import platform
import re
import resource
from collections.abc import Iterator
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc malloc.h

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # how OpenMP's threads wait for each other
SPINS, SPINS_BUSY = 20_000, 500  # before a thread that waits gives up its processor
BUSY = "this machine was busy in the last minute: what is measured now may be slow for it"

OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def get_device() -> str:
    """Return "mps" if available, else "cpu". Never "cuda", which must be requested explicitly."""
    import torch

    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_device(name: str | None) -> str:
    """Return `name` if that device is available; `get_device()` if it is None.

    Raises:
        ValueError: if the name is not cpu, mps, cuda or cuda:N, or the device is unavailable.
    """
    if name is None:
        return get_device()
    match = re.fullmatch(r"(cpu|mps|cuda)(?::([0-9]{1,3}))?", name)
    if match is None or (match[2] and match[1] != "cuda"):
        raise ValueError(f"unknown device {name!r}; use cpu, mps, cuda or cuda:N")
    if match[1] == "cpu":
        return name
    import torch

    if match[1] == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not available (needs an Apple GPU); use cpu")
    if match[1] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not available; use {get_device()}")
    if match[2] and int(match[2]) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not available: there are {torch.cuda.device_count()}")
    return name


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next step instead of returning it to the system.

    Getting it back would cost thousands of page faults per step. The setting applies to the whole
    process, so commands make it and importing never does. A script may call this, or set
    MALLOC_MMAP_THRESHOLD_=1073741824 and MALLOC_TRIM_THRESHOLD_=2147483647 in its environment.
    Returns False, having done nothing, if the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    )


# --- limits ------------------------------------------------------------------------------------


def available_memory() -> int:
    """Return the bytes of main memory that this process may use.

    The least of the machine's memory, the limit of its address space and those of its cgroups.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    limits = [machine, *([] if address_space == resource.RLIM_INFINITY else [address_space])]
    for folder in _cgroup_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limits += _numbers(folder / name)
    return min(limits)


def metal_memory() -> int:
    """Return the bytes of main memory that Metal holds for this process; 0 where it is absent.

    The driver keeps what it once allocated, so this is a peak.
    """
    import torch

    return torch.mps.driver_allocated_memory() if torch.backends.mps.is_available() else 0


def available_processors() -> int:
    """Return the number of processors that this process may use, at least 1.

    The least of its affinity and its cgroups' shares of time; a part of a processor counts as one.
    """
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()]
    for folder in _cgroup_folders("cpu"):
        v1 = [*_numbers(folder / "cpu.cfs_quota_us"), *_numbers(folder / "cpu.cfs_period_us")]
        for share in (_numbers(folder / "cpu.max"), v1):
            if len(share) == 2 and min(share) > 0:
                limits.append(math.ceil(share[0] / share[1]))
    return max(1, min(limit for limit in limits if limit is not None))


def limit_threads() -> None:
    """Give torch no more threads than there are processors, unless OMP_NUM_THREADS says so."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > available_processors():
        torch.set_num_threads(available_processors())


def share_processors() -> None:
    """Have OpenMP's threads wait for each other in a way that leaves processors to other programs.

    GNU's OpenMP has a thread that waits for the others spin for a long time, and so hold a
    processor that one of them needs if the machine is busy with something else. It reads the
    variable when torch is loaded. No bit of a result depends on it, and one that is set stays.
    """
    if os.environ.keys().isdisjoint(WAITING):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS_BUSY if is_busy() else SPINS)


def is_busy() -> bool:
    """Return whether the load of the last minute is above half of the processors."""
    return os.getloadavg()[0] > available_processors() / 2


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroups and of those around them, v2 and v1."""
    with contextlib.suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            for root in {CGROUPS / controllers, CGROUPS / (controllers and controller)}:
                own = root / path.lstrip("/")
                yield from (own, *(p for p in own.parents if p.is_relative_to(root)))


def _numbers(file: Path) -> list[int]:
    """Return the numbers in a file such as "150000 100000"; [] for "max", or without the file."""
    with contextlib.suppress(OSError, ValueError):
        return [int(word) for word in file.read_text().split()]
    return []
