"""The allocator setting: made by the train command before torch is imported, on glibc only.

What it saves is a figure of the machine: `python -m benchmarks --only memory` counts page faults.
"""

import platform

from niels_gpt import allocator


def test_glibc_takes_the_setting_and_others_are_left_alone(monkeypatch):
    assert allocator.keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", None)
    assert not allocator.keep_freed_memory()
