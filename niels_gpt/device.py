"""The device of a run, and an allocator setting. Torch is imported only when needed."""

import ctypes
import platform
import re

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc malloc.h


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
