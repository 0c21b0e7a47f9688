"""Which ISA extensions a vCPU has, and which of them user space may switch (KVM_ABI 1.11, type ISA_EXT).

The one place that says what kvmcore/isa implements, in KVM's terms. Called by one_reg.py. An extension is
listed here only if guests may use it in full.
"""

from __future__ import annotations

from protocol.abi.structs_riscv import IsaExt

X = IsaExt

OFFERED: frozenset[IsaExt] = frozenset(
    (
        X.A, X.C, X.D, X.F, X.I, X.M,
        X.SSTC, X.SSAIA, X.SVADU, X.SVVPTC, X.ZKR,
        X.ZICBOM, X.ZICBOP, X.ZICBOZ, X.ZICNTR, X.ZICSR, X.ZIFENCEI, X.ZIHPM, X.ZIHINTPAUSE,
        X.ZBA, X.ZBB, X.ZBS,
        X.ZCA, X.ZCD, X.ZICCRSE, X.ZAAMO, X.ZALRSC,
    )
)  # fmt: skip
"""On in a new vCPU. SVADU: the page walk sets A and D bits itself. SVVPTC: invalid entries are never
cached.
"""

NEVER: frozenset[IsaExt] = frozenset((X.H,))
"""Known, listed, and off for ever: as on Linux, no nested guests."""

SWITCHABLE: frozenset[IsaExt] = frozenset((X.D, X.F, X.ZICBOM, X.ZICBOZ, X.SVADU))
"""User space may switch these off (and on again) before the vCPU's first run. The others: EINVAL."""

SINGLE_LETTER: dict[IsaExt, int] = {
    extension: ord(extension.name) - ord("A") for extension in (X.A, X.C, X.D, X.F, X.H, X.I, X.M)
}
"""Bit of an extension in the config register `isa`, as in misa."""

MAX_6_12 = X.ZAWRS
"""The last id that Linux 6.12 knows."""

CBO_BLOCK = 64
"""Bytes of a cache block (Zicbom, Zicboz, Zicbop)."""
