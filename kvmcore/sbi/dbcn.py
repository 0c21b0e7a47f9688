"""SBI DBCN: the debug console (SBI chapter 12). User space owns the console, so every call is forwarded.

Off until user space switches it on (ONE_REG SBI_EXT 9), since only then does somebody answer.
"""

from __future__ import annotations

from kvmcore.sbi.extension import Extension
from kvmcore.sbi.forwarded import forward
from protocol.abi.structs_riscv import SBI_DBCN, SbiExt

EXTENSION = Extension("DBCN", SBI_DBCN, SBI_DBCN, SbiExt.DBCN, forward)
