"""Threads that mostly wait and have little to do when they are woken: a hint for the host's scheduler.

Linux 6.12 and later (EEVDF) run a thread that asks for short slices sooner; no privilege is needed, and its share of the
processor stays what it was (sched_setattr(2), sched_runtime of SCHED_OTHER). Elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

SLICE_NS = 100_000
"""The shortest that there is."""
VCPU_SLICE_NS = 400_000
"""For threads that also run for long: not to be switched all the time where they compete with one another."""
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274}.get(platform.machine(), -1)
_ATTRIBUTES = struct.Struct("<IIQiIQQQ")


def woken_soon(slice_ns: int = SLICE_NS) -> None:
    """The calling thread is one of these. Its nice value stays."""
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = ctypes.create_string_buffer(_ATTRIBUTES.pack(_ATTRIBUTES.size, 0, 0, nice, 0, slice_ns, 0, 0))
    ctypes.CDLL(None).syscall(_SCHED_SETATTR, 0, attributes, 0)
