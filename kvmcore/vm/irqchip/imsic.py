"""The IMSIC of one vCPU: where MSIs arrive (AIA specification chapter 3).

Its state lives in the engine's hart (the guest reads and claims it through CSRs, natively); this is the
side of the senders and of the AIA device's attributes. Called by aia.py. A change is seen by the hart at
its next safe point at the latest, and ends a WFI.
"""

from __future__ import annotations

from errno import EINVAL, ENODEV, ENOENT
from typing import TYPE_CHECKING

from protocol.abi.errors import KvmError

if TYPE_CHECKING:
    from kvmcore.vm.vcpu import Vcpu

EIDELIVERY, EITHRESHOLD, EIP0, EIE0 = 0x70, 0x72, 0x80, 0xC0
SETEIPNUM_LE, SETEIPNUM_BE = 0, 4


class Imsic:
    """Interrupt file of `vcpu`: identities 1..`identities`."""

    def __init__(self, vcpu: Vcpu, identities: int, hart_index: int) -> None:
        self.vcpu = vcpu
        self.identities = identities
        self.hart_index = hart_index
        vcpu.hart.enable_imsic(identities)

    def inject(self, guest_index: int, offset: int, identity: int) -> None:
        """An MSI: `identity` written at `offset` of the page. ENODEV: not an MSI register; EINVAL: no such
        identity.
        """
        if guest_index or not identity or offset not in (SETEIPNUM_LE, SETEIPNUM_BE):
            raise KvmError(ENODEV, reason="no such interrupt file")
        if offset == SETEIPNUM_BE:
            identity = int.from_bytes(identity.to_bytes(4, "little"), "big")
        if identity > self.identities:
            raise KvmError(EINVAL, reason=f"interrupt identity {identity}")
        self.vcpu.hart.inject_msi(identity)

    def _locate(self, select: int) -> tuple[str, int]:
        if select == EIDELIVERY:
            return "eidelivery", 0
        if select == EITHRESHOLD:
            return "eithreshold", 0
        if EIP0 <= select < EIE0 + 0x40:
            word = (select & 0x3F) // 2
            if select & 1 or word * 64 > self.identities:
                raise KvmError(EINVAL, reason=f"iselect {select:#x}")
            return ("eip" if select < EIE0 else "eie"), word
        raise KvmError(ENOENT, reason=f"iselect {select:#x}")

    def check(self, select: int) -> None:
        """ENOENT: no such register; EINVAL: an odd one (RV64 has the even ones), or beyond the identities."""
        self._locate(select)

    def read(self, select: int) -> int:
        """A register by its iselect value, 64 bits."""
        name, index = self._locate(select)
        return self.vcpu.hart.read_imsic(name, index)

    def write(self, select: int, value: int) -> None:
        """Set a register (state restore). Bits that it does not have are ignored."""
        name, index = self._locate(select)
        with self.vcpu.vm.machine.quiesce():
            self.vcpu.hart.write_imsic(name, index, value)
        self.vcpu.wake()
