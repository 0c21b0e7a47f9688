"""The PCI Express host bridge: ECAM, the windows through which BARs are reached, INTx wires, the tree node.

`pci-host-ecam-generic`, as QEMU's virt has it: one bus, no bridges behind it, and nothing that needs set-up. The
device itself answers the ECAM; each Window is put on the machine's bus beside it.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, ClassVar, Literal, NamedTuple

from qemu_user.devices.device import Device, FdtNode, InterruptLine, Place, State
from qemu_user.devices.pci import config_space as cfg
from qemu_user.devices.pci.config_space import Identity
from qemu_user.devices.pci.function import FunctionState, PciFunction
from qemu_user.devices.pci.intx import PINS, SharedWire, swizzle

SLOTS = 32
BRIDGE = Identity(0x1B36, 0x0008, 0x060000, subsystem_vendor=0x1AF4, subsystem=0x1100)
"""QEMU's generic host bridge, function 00:00.0."""
_ECAM_FUNCTION_SHIFT, _ECAM_SLOT_SHIFT, _ECAM_BUS_SHIFT = 12, 15, 20
IO, MEMORY32, MEMORY64 = 0x0100_0000, 0x0200_0000, 0x0300_0000
"""Address spaces, the first cell of a PCI address in the tree (PCI bus binding to IEEE 1275, 2.2.1.1)."""


class Mapping(NamedTuple):
    """Bus addresses [start, end) are BAR `bar` of `function`."""

    start: int
    end: int
    function: PciFunction
    bar: int


class PciHostState(State, frozen=True, tag="pci_host", kw_only=True):
    """Function 00:00.0; the others are devices of their own."""

    version: Literal[1] = 1
    bridge: FunctionState


class Window:
    """`size` bytes at guest-physical `base` are bus addresses from `bus_base` on. On the machine's bus."""

    def __init__(self, name: str, space: int, base: int, bus_base: int, size: int) -> None:
        self.name, self.space, self.base, self.bus_base, self.size = name, space, base, bus_base, size
        self._table: tuple[list[int], list[Mapping]] = [], []
        """Replaced as a whole: vCPU threads read it without a lock."""

    def take(self, mappings: list[Mapping]) -> None:
        """These BARs are decoded now, sorted by address."""
        self._table = [mapping.start for mapping in mappings], mappings

    def to_physical(self, address: int, size: int) -> int | None:
        """Guest-physical address of a bus range inside the window."""
        inside = self.bus_base <= address and address + size <= self.bus_base + self.size
        return self.base + address - self.bus_base if inside else None

    def _find(self, offset: int, size: int) -> Mapping | None:
        address, (starts, mappings) = self.bus_base + offset, self._table
        position = bisect_right(starts, address) - 1
        if position >= 0:
            mapping = mappings[position]
            if mapping.start <= address and address + size <= mapping.end:
                return mapping
        return None

    def behind(self, offset: int, size: int) -> Device | None:
        """The device that answers there."""
        mapping = self._find(offset, size)
        return mapping.function if mapping is not None else None

    def read(self, offset: int, size: int) -> int:
        """An address that no BAR answers reads as ones (master abort)."""
        mapping = self._find(offset, size)
        if mapping is None:
            return (1 << 8 * size) - 1
        return mapping.function.read_bar(mapping.bar, self.bus_base + offset - mapping.start, size)

    def write(self, offset: int, size: int, value: int) -> None:
        mapping = self._find(offset, size)
        if mapping is not None:
            mapping.function.write_bar(mapping.bar, self.bus_base + offset - mapping.start, size, value)


class PciHost(Device):
    """`wires`: the four INTx; `cells[n]`: what the tree's interrupt-map says of wire n under `parent`."""

    compatible: ClassVar[str | list[str]] = "pci-host-ecam-generic"
    region_size = 0x1000_0000
    State = PciHostState

    def __init__(
        self,
        name: str,
        windows: list[Window],
        wires: list[InterruptLine],
        cells: list[list[int]],
        parent: int,
        msi_parent: int = 0,
    ) -> None:
        super().__init__(name)
        self.windows = windows
        self._wires = [SharedWire(line) for line in wires]
        self._cells, self._parent, self._msi_parent = cells, parent, msi_parent
        self.functions: dict[int, PciFunction] = {}
        self.attach(PciFunction("bridge", BRIDGE, []), 0)

    def attach(self, function: PciFunction, slot: int) -> None:
        """Plug a function in as function 0 of a slot (0 to 31). ValueError if the slot is taken."""
        if slot in self.functions or not 0 <= slot < SLOTS:
            raise ValueError(f"{function.name}: PCI slot {slot:#x} is taken or not there")
        self.functions[slot] = function
        pin = function.config_space.read(cfg.INTERRUPT_PIN, 1)
        function.attach(slot, self._wires[swizzle(slot, pin or 1)].tap(), self._remap, self._physical)

    def _remap(self) -> None:
        found: dict[int, list[Mapping]] = {id(window): [] for window in self.windows}
        with self.lock:
            for function in self.functions.values():
                for index, address in function.mapped.items():
                    bar = function.config_space.bars[index]
                    for window in self.windows:
                        fits = window.to_physical(address, bar.size) is not None
                        if fits and (window.space == IO) == (bar.kind == "io"):
                            found[id(window)].append(Mapping(address, address + bar.size, function, index))
            for window in self.windows:
                window.take(sorted(found[id(window)], key=lambda mapping: mapping.start))

    def _physical(self, address: int, size: int) -> int | None:
        """Guest-physical address of a range of memory space, None if no window reaches it."""
        for window in self.windows:
            if window.space != IO and (found := window.to_physical(address, size)) is not None:
                return found
        return None

    # -- ECAM (PCI Express 7.2.2) ------------------------------------------------------------------

    def _function(self, offset: int) -> PciFunction | None:
        if offset >> _ECAM_BUS_SHIFT or offset >> _ECAM_FUNCTION_SHIFT & 7:
            return None
        return self.functions.get(offset >> _ECAM_SLOT_SHIFT & 31)

    def behind(self, offset: int, size: int) -> Device | None:
        return self._function(offset)

    def read(self, offset: int, size: int) -> int:
        function = self._function(offset)
        if function is None:
            return (1 << 8 * size) - 1
        return function.read(offset & 0xFFF, size)

    def write(self, offset: int, size: int, value: int) -> None:
        function = self._function(offset)
        if function is not None:
            function.write(offset & 0xFFF, size, value)

    # -- tree and state ----------------------------------------------------------------------------

    def fdt_node(self, place: Place) -> FdtNode:
        ranges: list[int] = []
        for window in self.windows:
            cells = [window.space]
            for number in (window.bus_base, window.base, window.size):
                cells += [number >> 32, number & 0xFFFFFFFF]
            ranges += cells
        interrupts: list[int] = []
        for slot in range(PINS):
            for pin in range(1, PINS + 1):
                interrupts += [slot << 11, 0, 0, pin, self._parent, *self._cells[swizzle(slot, pin)]]
        return FdtNode(
            f"pci@{place.base:x}",
            {
                "compatible": self.compatible,
                "device_type": "pci",
                "reg": place.reg(),
                "#address-cells": 3,
                "#size-cells": 2,
                "#interrupt-cells": 1,
                "linux,pci-domain": 0,
                "bus-range": [0, (self.region_size >> _ECAM_BUS_SHIFT) - 1],
                "dma-coherent": True,
                "ranges": ranges,
                "interrupt-map-mask": [0x1800, 0, 0, 7],
                "interrupt-map": interrupts,
                "msi-parent": self._msi_parent if self._msi_parent else False,
            },
        )

    def save(self) -> PciHostState:
        return PciHostState(bridge=self.functions[0].save_function())

    def restore(self, state: Any) -> None:
        self.functions[0].check_function(state.bridge)
        self.functions[0].restore_function(state.bridge)

    def reset(self) -> None:
        self.functions[0].reset()
