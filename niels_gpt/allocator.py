"""The one setting of the C library's allocator that pays for training on a CPU."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc malloc.h


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
