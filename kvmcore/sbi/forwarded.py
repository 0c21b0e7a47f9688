"""The SBI ranges that go to user space whole: experimental and vendor extensions (SBI chapter 3)."""

from __future__ import annotations

from collections.abc import Sequence

from kvmcore.sbi.extension import After, Caller, Extension, Result
from protocol.abi.structs_riscv import SBI_EXPERIMENTAL, SBI_VENDOR, SbiExt


def forward(caller: Caller, function: int, args: Sequence[int]) -> Result:
    """User space answers, with a0 and a1 preset to NOT_SUPPORTED and 0."""
    return Result(after=After.FORWARD)


EXPERIMENTAL = Extension("EXPERIMENTAL", *SBI_EXPERIMENTAL, SbiExt.EXPERIMENTAL, forward)
VENDOR = Extension("VENDOR", *SBI_VENDOR, SbiExt.VENDOR, forward)
