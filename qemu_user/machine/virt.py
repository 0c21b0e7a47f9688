"""The map of the machine: QEMU's `virt`, so that what is made for it runs.

One table; the bus, the device tree, the interrupt wires and the documentation derive from it. Nothing else in
the project holds an address of this machine.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """A region: bytes from `base` on, and the interrupt source (0: none)."""

    name: str
    base: int
    size: int
    irq: int = 0


VIRTIO_COUNT = 8

MAP: tuple[Entry, ...] = (
    Entry("test", 0x0010_0000, 0x1000),
    Entry("rtc", 0x0010_1000, 0x1000, 11),
    Entry("vmgenid", 0x0010_2000, 0x1000, 12),  # where and if: ours, QEMU's machine has none
    Entry("pcie-io", 0x0300_0000, 0x1_0000),
    Entry("plic", 0x0C00_0000, 0x60_0000),
    Entry("aplic", 0x0D00_0000, 0x4000),
    Entry("uart", 0x1000_0000, 0x100, 10),
    *(Entry(f"virtio{n}", 0x1000_1000 + 0x1000 * n, 0x1000, 1 + n) for n in range(VIRTIO_COUNT)),
    Entry("flash", 0x2000_0000, 0x400_0000),
    Entry("imsic", 0x2800_0000, 0x1000),  # per hart
    Entry("pcie", 0x3000_0000, 0x1000_0000, 32),  # ECAM; INTA to INTD are the sources from 32 on
    Entry("pcie-memory", 0x4000_0000, 0x4000_0000),
    Entry("ram", 0x8000_0000, 0),  # as much as -m says
)

PLACES: dict[str, Entry] = {entry.name: entry for entry in MAP}

RAM_BASE = PLACES["ram"].base
IMSIC_STRIDE = PLACES["imsic"].size
INTERRUPT_SOURCES = 96
"""Of the APLIC: 1 to 96. The PLIC has 1 to 95."""
IMSIC_IDENTITIES = 255
TREE_LIMIT = 0xC000_0000
"""The device tree lies below this address, as QEMU has it, so that 32-bit loaders reach it."""
HIGH_WINDOW = 16 << 30
"""Bytes of the PCI window for 64-bit BARs; it starts at the first multiple of its size behind RAM, as QEMU's does."""
