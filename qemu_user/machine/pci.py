"""The PCI host of the machine: its windows and wires out of the map, and which slot a device gets.

Called once by machine/build.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from qemu_user.config.machine_config import Slot
from qemu_user.devices.pci.host import IO, MEMORY32, MEMORY64, PciHost, Window
from qemu_user.devices.pci.intx import PINS
from qemu_user.machine import virt
from qemu_user.machine.irq import PHANDLE_CONTROLLER, PHANDLE_IMSIC, Interrupts

T = TypeVar("T")


def make_host(interrupts: Interrupts, ram: int) -> PciHost:
    """QEMU virt's bridge. `ram`: bytes of RAM, behind which the window for 64-bit BARs begins."""
    io, memory = virt.PLACES["pcie-io"], virt.PLACES["pcie-memory"]
    high = -(-(virt.RAM_BASE + ram) // virt.HIGH_WINDOW) * virt.HIGH_WINDOW
    first = virt.PLACES["pcie"].irq
    windows = [
        Window("pcie-io", IO, io.base, 0, io.size),
        Window("pcie-memory", MEMORY32, memory.base, memory.base, memory.size),
        Window("pcie-high-memory", MEMORY64, high, high, virt.HIGH_WINDOW),
    ]
    return PciHost(
        "pcie",
        windows,
        [interrupts.level(first + pin) for pin in range(PINS)],
        [interrupts.cells(first + pin, False) for pin in range(PINS)],
        PHANDLE_CONTROLLER,
        PHANDLE_IMSIC if interrupts.msi else 0,
    )


def assign(wanted: Iterable[tuple[Slot, T]]) -> list[tuple[str, int, T]]:
    """(bus, number, device), sorted: asked-for numbers are kept free for those who asked, the others get the
    lowest that are left (PCI slot 0 is the bridge).
    """
    wanted = list(wanted)
    taken = {(slot.bus, slot.number) for slot, _ in wanted}
    free = {"pci": iter(range(1, 32)), "mmio": iter(range(virt.VIRTIO_COUNT))}
    found: list[tuple[str, int, T]] = []
    for slot, device in wanted:
        number = slot.number
        if number is None:
            number = next(n for n in free[slot.bus] if (slot.bus, n) not in taken)
        found.append((slot.bus, number, device))
    return sorted(found, key=lambda entry: (entry[0], entry[1]))
