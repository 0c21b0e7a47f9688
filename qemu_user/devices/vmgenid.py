"""The generation id: 16 bytes that change when the VM is not the one any more that it was, being a clone or taken back to a
snapshot, and an interrupt that tells the driver.

The ACPI device of Microsoft's "Virtual Machine Generation ID" (2012) as a device-tree node, `microsoft,vmgenid` (Linux's
Documentation/devicetree/bindings/rng/microsoft,vmgenid.yaml; drivers/virt/vmgenid.c since Linux 6.10): the guest's random
numbers are seeded anew at once, so that no two VMs draw the same.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from qemu_user.devices.device import Device, FdtNode, InterruptLine, Place, State, require

SIZE = 16


class VmGenIdState(State, frozen=True, tag="vmgenid", kw_only=True):
    """The id, as the guest has read it last or may have."""

    version: Literal[1] = 1
    generation: bytes


class VmGenId(Device):
    """Read-only memory of 16 bytes. `generation`: the id to begin with."""

    compatible: ClassVar[str | list[str]] = "microsoft,vmgenid"
    region_size = 0x1000
    State = VmGenIdState

    def __init__(self, name: str, irq: InterruptLine, generation: bytes) -> None:
        super().__init__(name)
        self._irq, self.generation = irq, generation

    def renew(self, generation: bytes) -> None:
        """This is another VM from now on. Any thread."""
        with self.lock:
            self.generation = generation
            self._irq.assert_line()
            self.changed()

    def read(self, offset: int, size: int) -> int:
        if offset + size > SIZE:
            return self.bad_access(offset, size)
        return int.from_bytes(self.generation[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.bad_access(offset, size)

    def fdt_node(self, place: Place) -> FdtNode:
        return FdtNode(f"rng@{place.base:x}", place.properties(self.compatible))

    def save(self) -> VmGenIdState:
        return VmGenIdState(generation=self.generation)

    def restore(self, state: Any) -> None:
        require(len(state.generation) == SIZE, f"{self.name}: an id of {len(state.generation)} bytes")
        self.generation = state.generation

    def reset(self) -> None:
        pass
