"""SBI HSM: starting and stopping harts (SBI chapter 9)."""

from __future__ import annotations

from collections.abc import Sequence

from kvmcore.sbi.extension import After, Caller, Extension, Result
from protocol.abi.structs_riscv import (
    SBI_ALREADY_AVAILABLE,
    SBI_HSM,
    SBI_INVALID_ADDRESS,
    SBI_INVALID_PARAM,
    SBI_NOT_SUPPORTED,
    SbiExt,
)

_START, _STOP, _STATUS, _SUSPEND = range(4)
SUSPEND_RETENTIVE, SUSPEND_NON_RETENTIVE = 0x00000000, 0x80000000


def call(caller: Caller, function: int, args: Sequence[int]) -> Result:
    """0 start(hart, pc, opaque), 1 stop(), 2 status(hart), 3 suspend(type)."""
    if function == _START:
        return _start(caller, args[0], args[1], args[2])
    if function == _STOP:
        caller.hart_stop()
        return Result()
    if function == _STATUS:
        if args[0] not in caller.harts():
            return Result(SBI_INVALID_PARAM)
        return Result(value=caller.hart_status(args[0]))
    if function == _SUSPEND:
        kind = args[0] & 0xFFFFFFFF
        if kind == SUSPEND_RETENTIVE:
            return Result(after=After.SLEEP)
        return Result(SBI_NOT_SUPPORTED if kind == SUSPEND_NON_RETENTIVE else SBI_INVALID_PARAM)
    return Result(SBI_NOT_SUPPORTED)


def _start(caller: Caller, hart: int, pc: int, opaque: int) -> Result:
    if hart not in caller.harts():
        return Result(SBI_INVALID_PARAM)
    if not caller.is_memory(pc):
        return Result(SBI_INVALID_ADDRESS)
    return Result() if caller.hart_start(hart, pc, opaque) else Result(SBI_ALREADY_AVAILABLE)


EXTENSION = Extension("HSM", SBI_HSM, SBI_HSM, SbiExt.HSM, call)
