"""What a run computes on, and how memory is handled there. Torch is imported only when used."""

import ctypes
import platform
import re

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc malloc.h


def get_device() -> str:
    """Return "mps" where Apple's GPU can be used, else "cpu". Never "cuda": that is asked for."""
    import torch

    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_device(name: str | None) -> str:
    """Return a device that can be used: `get_device()` for None, else `name` once checked.

    Takes cpu, mps, cuda and cuda:N; ValueError for another name or a device that is not here.
    """
    if name is None:
        return get_device()
    match = re.fullmatch(r"(cpu|mps|cuda)(?::([0-9]{1,3}))?", name)
    if match is None or (match[2] and match[1] != "cuda"):
        raise ValueError(f"device {name!r} is not known; use cpu, mps, cuda or cuda:N")
    if match[1] == "cpu":
        return name
    import torch

    if match[1] == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not available here (needs an Apple GPU); use cpu")
    if match[1] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not available here; use {get_device()}")
    if match[2] and int(match[2]) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not here; there are {torch.cuda.device_count()}")
    return name


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next step instead of giving it back to the system.

    Memory that is given back comes again as page faults and zeroed pages, thousands a step. It is a
    setting of the whole process, so commands make it and importing makes it never; a script may
    call this itself, or set MALLOC_MMAP_THRESHOLD_=1073741824 and MALLOC_TRIM_THRESHOLD_=2147483647
    in its environment. Returns False where there is no glibc, and nothing was done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    )
