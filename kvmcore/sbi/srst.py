"""SBI SRST: shutdown and reboot (SBI chapter 10). User space gets a system event; no hart runs meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

from kvmcore.sbi.extension import After, Caller, Extension, Result
from protocol.abi.structs_riscv import SBI_NOT_SUPPORTED, SBI_SRST, SbiExt

SHUTDOWN, COLD_REBOOT, WARM_REBOOT = range(3)


def call(caller: Caller, function: int, args: Sequence[int]) -> Result:
    """0 system_reset(type, reason)."""
    kind = args[0] & 0xFFFFFFFF
    if function != 0 or kind > WARM_REBOOT:
        return Result(SBI_NOT_SUPPORTED)
    return Result(value=args[1], after=After.SHUTDOWN if kind == SHUTDOWN else After.RESET)


EXTENSION = Extension("SRST", SBI_SRST, SBI_SRST, SbiExt.SRST, call)
