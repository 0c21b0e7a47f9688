"""SBI TIME: the timer for guests that do not use Sstc (SBI chapter 6)."""

from __future__ import annotations

from collections.abc import Sequence

from kvmcore.sbi.extension import Caller, Extension, Result
from protocol.abi.structs_riscv import SBI_NOT_SUPPORTED, SBI_TIME, SbiExt


def call(caller: Caller, function: int, args: Sequence[int]) -> Result:
    """0 set_timer(time): an interrupt at this time; a pending one is cleared."""
    if function != 0:
        return Result(SBI_NOT_SUPPORTED)
    caller.set_timer(args[0])
    return Result()


EXTENSION = Extension("TIME", SBI_TIME, SBI_TIME, SbiExt.TIME, call)
