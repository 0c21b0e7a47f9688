"""SBI BASE: versions, and which extensions there are (SBI chapter 4). Cannot be switched off."""

from __future__ import annotations

from collections.abc import Sequence

from kvmcore.sbi.extension import After, Caller, Extension, Result
from protocol.abi.structs_riscv import SBI_BASE, SBI_NOT_SUPPORTED

IMPLEMENTATION_KVM = 3
_MACHINE_IDS = {4: "mvendorid", 5: "marchid", 6: "mimpid"}


def call(caller: Caller, function: int, args: Sequence[int]) -> Result:
    """0 spec version, 1 implementation id, 2 its version, 3 probe, 4-6 machine ids."""
    if function == 0:
        return Result(value=caller.spec_version())
    if function == 1:
        return Result(value=IMPLEMENTATION_KVM)
    if function == 2:
        return Result(value=caller.implementation_version())
    if function == 3:
        if caller.is_forwarded(args[0]):
            return Result(after=After.FORWARD)
        return Result(value=caller.probe(args[0]))
    if function in _MACHINE_IDS:
        return Result(value=caller.machine_id(_MACHINE_IDS[function]))
    return Result(SBI_NOT_SUPPORTED)


EXTENSION = Extension("BASE", SBI_BASE, SBI_BASE, None, call)
