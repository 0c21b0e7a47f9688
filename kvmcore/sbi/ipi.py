"""SBI IPI: software interrupts to other harts (SBI chapter 7)."""

from __future__ import annotations

from collections.abc import Sequence

from kvmcore.sbi.extension import Caller, Extension, Result, selected
from protocol.abi.structs_riscv import SBI_INVALID_PARAM, SBI_IPI, SBI_NOT_SUPPORTED, SBI_SUCCESS, SbiExt


def call(caller: Caller, function: int, args: Sequence[int]) -> Result:
    """0 send_ipi(hart_mask, hart_mask_base). A bit without a hart: INVALID_PARAM, the others are sent."""
    if function != 0:
        return Result(SBI_NOT_SUPPORTED)
    harts, complete = selected(caller, args[0], args[1])
    for hart in harts:
        caller.send_ipi(hart)
    return Result(SBI_SUCCESS if complete else SBI_INVALID_PARAM)


EXTENSION = Extension("IPI", SBI_IPI, SBI_IPI, SbiExt.IPI, call)
