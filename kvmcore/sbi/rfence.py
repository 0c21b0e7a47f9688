"""SBI RFENCE: fences on other harts (SBI chapter 8). The call returns when each of them has done it.

The hypervisor fences (functions 3-6) need nested virtualization, which there is not.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvmcore.sbi.extension import U64, Caller, Extension, Result, selected
from protocol.abi.structs_riscv import SBI_INVALID_PARAM, SBI_NOT_SUPPORTED, SBI_RFENCE, SBI_SUCCESS, SbiExt

_FENCE_I, _SFENCE_VMA, _SFENCE_VMA_ASID = range(3)


def call(caller: Caller, function: int, args: Sequence[int]) -> Result:
    """0 remote fence.i, 1 sfence.vma(start, size), 2 the same for one ASID; start = size = 0 or size -1:
    all.
    """
    if function not in (_FENCE_I, _SFENCE_VMA, _SFENCE_VMA_ASID):
        return Result(SBI_NOT_SUPPORTED)
    harts, complete = selected(caller, args[0], args[1])
    if function == _FENCE_I:
        caller.fence_i(harts)
    else:
        start, size = args[2], args[3]
        if start == 0 and size == 0:
            size = U64
        asid = args[4] & 0xFFFF if function == _SFENCE_VMA_ASID else None
        caller.sfence_vma(harts, start, size, asid)
    return Result(SBI_SUCCESS if complete else SBI_INVALID_PARAM)


EXTENSION = Extension("RFENCE", SBI_RFENCE, SBI_RFENCE, SbiExt.RFENCE, call)
