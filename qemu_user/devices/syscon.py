"""The test finisher ("sifive,test"), through which guests power off and reset by a store.

One 32-bit register at offset 0, as QEMU's hw/misc/sifive_test.c. Linux reaches it by syscon-poweroff and
syscon-reboot nodes, which it adds beside its own. `power` is called with what the guest asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from qemu_user.devices.device import Device, FdtNode, Place, State

FAIL, PASS, RESET = 0x3333, 0x5555, 0x7777

Power = Callable[[Literal["shutdown", "reset"], int], None]
"""(what, exit status): called on the vCPU's thread."""


class SysconState(State, frozen=True, tag="syscon", kw_only=True):
    """It keeps nothing."""

    version: Literal[1] = 1


class Syscon(Device):
    """Write-only: low half the command, high half the status of FAIL."""

    compatible: ClassVar[str | list[str]] = ["sifive,test1", "sifive,test0", "syscon"]
    region_size = 0x1000
    State = SysconState

    def __init__(self, name: str, power: Power) -> None:
        super().__init__(name)
        self._power = power

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        command = value & 0xFFFF
        if offset != 0 or size < 2 or command not in (FAIL, PASS, RESET):
            self.bad_access(offset, size)
        elif command == RESET:
            self._power("reset", 0)
        else:
            self._power("shutdown", 0 if command == PASS else value >> 16 & 0xFFFF)

    def fdt_node(self, place: Place) -> FdtNode:
        return FdtNode(f"test@{place.base:x}", place.properties(self.compatible))

    def save(self) -> SysconState:
        return SysconState()

    def restore(self, state: Any) -> None:
        pass

    def reset(self) -> None:
        pass
