"""PCI: configuration space as software probes it, BARs in their windows, INTx, MSI-X, and virtio's capabilities.

Names of tests give the section: PCI Local Bus Specification 3.0, or virtio 1.2 (4.1).
"""

from __future__ import annotations

import itertools
import random
import struct
from pathlib import Path

import pytest

from qemu_user.backends.net.backend import NetBackend
from qemu_user.devices.device import Place, StateError, decode_state, encode_state
from qemu_user.devices.pci import config_space as cfg
from qemu_user.devices.pci.config_space import Bar, ConfigSpace, Identity
from qemu_user.devices.pci.function import PciFunction
from qemu_user.devices.virtio import mmio, pci
from qemu_user.devices.virtio.blk import VirtioBlk
from qemu_user.devices.virtio.net import VirtioNet
from qemu_user.devices.virtio.pci import VirtioPci
from qemu_user.devices.virtio.rng import VirtioRng
from qemu_user.machine.fdt import property_bytes
from tests.framework.devices import Bench
from tests.framework.virtio_driver import PciDriver, capabilities


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, "pci")


@pytest.fixture
def driver(bench: Bench) -> PciDriver:
    function = bench.virtio(VirtioRng("rng"))
    assert isinstance(function, VirtioPci)
    return PciDriver(function, bench.memory, bench.bridge)


class Scratch(PciFunction):
    """A function with one BAR of each kind, all of them memory."""

    def __init__(self) -> None:
        bars = [Bar(0, 0x100, "io"), Bar(1, 0x1000), Bar(2, 0x4000, "memory64", prefetchable=True), Bar(4, 16)]
        super().__init__("scratch", Identity(0x1234, 0x11E8, 0xFF0000), bars, pin=2)
        self.bytes = {bar.index: bytearray(bar.size) for bar in bars}

    def read_bar(self, index: int, offset: int, size: int) -> int:
        return int.from_bytes(self.bytes[index][offset : offset + size], "little")

    def write_bar(self, index: int, offset: int, size: int, value: int) -> None:
        self.bytes[index][offset : offset + size] = value.to_bytes(size, "little")


# -- configuration space ---------------------------------------------------------------------------


def test_6_2_1_absent_functions_read_as_ones(bench: Bench) -> None:
    host = bench.host()
    assert host.read(0, 4) == 0x0008_1B36
    assert host.read(1 << 15, 4) == 0xFFFF_FFFF
    assert host.read(1 << 12, 2) == 0xFFFF
    assert host.read(1 << 20, 1) == 0xFF
    host.write(1 << 15, 4, 0)


def test_6_2_only_declared_bits_are_writable(bench: Bench) -> None:
    host = bench.host()
    host.attach(Scratch(), 3)
    at = 3 << 15
    before = [host.read(at + offset, 4) for offset in range(0, 256, 4)]
    for offset in range(0, 256, 4):
        host.write(at + offset, 4, 0xFFFF_FFFF)
    after = [host.read(at + offset, 4) for offset in range(0, 256, 4)]
    changed = {4 * i: old ^ new for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new}
    assert changed == {
        cfg.COMMAND: 0x0547,
        cfg.CACHE_LINE_SIZE: 0xFF,
        0x10: 0xFFFF_FF00,
        0x14: 0xFFFF_F000,
        0x18: 0xFFFF_C000,
        0x1C: 0xFFFF_FFFF,
        0x20: 0xFFFF_FFF0,
        cfg.INTERRUPT_LINE: 0xFF,
    }


def test_6_2_5_1_bar_sizing() -> None:
    space = ConfigSpace(Identity(1, 2, 3), [Bar(0, 0x4000, "memory64", prefetchable=True), Bar(2, 0x40, "io")], 0)
    space.write(0x10, 8, (1 << 64) - 1)
    assert space.read(0x10, 8) == (1 << 64) - 0x4000 | 0b1100
    space.write(0x18, 4, 0xFFFF_FFFF)
    assert space.read(0x18, 4) == 0xFFFF_FFC1
    space.write(0x1C, 4, 0xFFFF_FFFF)
    assert space.read(0x1C, 4) == 0, "a BAR that is not there"


def test_6_7_capabilities_end_and_are_aligned(driver: PciDriver) -> None:
    assert driver.config(cfg.STATUS, 2) & cfg.HAS_CAPABILITIES
    found = capabilities(driver)
    assert [identifier for _, identifier in found] == [0x11, 9, 9, 9, 9, 9, 0x10]
    assert all(at % 4 == 0 and at >= 0x40 for at, _ in found)


def test_a_full_configuration_space_is_refused() -> None:
    space = ConfigSpace(Identity(1, 2, 3), [], 0)
    for _ in range(12):
        space.add_capability(9, bytes(14))
    with pytest.raises(ValueError, match="no room"):
        space.add_capability(9, bytes(14))


def test_bars_answer_where_they_are_put(bench: Bench) -> None:
    host = bench.host()
    function = Scratch()
    host.attach(function, 3)
    io, memory, high = host.windows
    for offset, value in ((0x10, 0x1000), (0x14, 0x4000_1000), (0x20, 0x4000_3000)):
        host.write(3 << 15 | offset, 4, value)
    host.write(3 << 15 | 0x18, 8, 0x4_0001_0000)
    assert memory.read(0x1000, 4) == 0xFFFF_FFFF, "decoding is off"
    host.write(3 << 15 | cfg.COMMAND, 2, cfg.MEMORY_ENABLE)
    for window, where, index in ((memory, 0x1000, 1), (high, 0x1_0000, 2), (memory, 0x3000, 4)):
        window.write(where + 8, 4, 0xCAFE + index)
        assert window.read(where + 8, 4) == 0xCAFE + index
        assert function.bytes[index][8:12] == struct.pack("<I", 0xCAFE + index)
    assert io.read(0x1000, 2) == 0xFFFF, "I/O decoding is off"
    host.write(3 << 15 | cfg.COMMAND, 2, cfg.MEMORY_ENABLE | cfg.IO_ENABLE)
    io.write(0x1010, 2, 0x1234)
    assert function.bytes[0][16:18] == b"\x34\x12"
    assert memory.read(0x1FFE, 4) == 0xFFFF_FFFF, "across the end of a BAR"
    host.write(3 << 15 | 0x14, 4, 0x4010_0000)
    assert memory.read(0x1008, 4) == 0xFFFF_FFFF
    assert memory.read(0x10_0008, 4) == 0xCAFE + 1
    host.write(3 << 15 | 0x14, 4, 0xF000_0000)
    assert memory.read(0x10_0008, 4) == 0xFFFF_FFFF, "outside every window"


# -- INTx ------------------------------------------------------------------------------------------


def test_2_2_6_wires_are_shared_and_swizzled(bench: Bench) -> None:
    host = bench.host()
    functions = [Scratch() for _ in range(8)]
    for slot, function in enumerate(functions, 1):
        host.attach(function, slot)
    functions[0].set_intx(True)  # slot 1, INTB
    functions[4].set_intx(True)  # slot 5, INTB: the same wire
    assert [line.level for line in bench.wires] == [False, False, True, False]
    functions[0].set_intx(False)
    assert bench.wires[2].level
    functions[4].set_intx(False)
    assert not bench.wires[2].level


def test_6_2_2_interrupt_disable(bench: Bench) -> None:
    host = bench.host()
    function = Scratch()
    host.attach(function, 1)
    function.set_intx(True)
    assert host.read(1 << 15 | cfg.STATUS, 2) & cfg.INTX_STATUS
    host.write(1 << 15 | cfg.COMMAND, 2, cfg.INTX_DISABLE)
    assert not bench.wires[2].level
    assert host.read(1 << 15 | cfg.STATUS, 2) & cfg.INTX_STATUS, "the status does not depend on it"
    host.write(1 << 15 | cfg.COMMAND, 2, 0)
    assert bench.wires[2].level


def test_interrupt_map_says_what_the_wires_are(bench: Bench) -> None:
    node = bench.host().fdt_node(Place(0x3000_0000, 0x1000_0000, [], 0))
    cells = struct.unpack(">112I", property_bytes(node.properties["interrupt-map"]))
    rows = [cells[at : at + 7] for at in range(0, 112, 7)]
    assert rows[0] == (0, 0, 0, 1, 1, 32, 4)
    assert {(row[0] >> 11, row[3]): row[5] for row in rows}[1, 2] == 34
    assert node.properties["msi-parent"] == 2


# -- MSI-X -----------------------------------------------------------------------------------------


def test_6_8_2_reset_masks_every_vector(bench: Bench) -> None:
    function = VirtioPci("rng", bench.memory, VirtioRng("rng"), bench.vector)
    assert [function.read_bar(1, 16 * i + 12, 4) for i in range(2)] == [1, 1]


def test_6_8_3_masked_vectors_wait_as_pending_bits(bench: Bench, driver: PciDriver) -> None:
    msix = driver.function.msix
    assert msix is not None
    driver.set_vector(1, 0x2800_1000, 77, masked=True)
    msix.fire(1)
    assert driver.bar_read(0x8800, 8) == 2
    assert not any(vector.fired for vector in bench.vectors)
    driver.set_vector(1, 0x2800_1000, 77, masked=False)
    assert driver.bar_read(0x8800, 8) == 0
    assert [vector.fired for vector in bench.vectors if vector.fired] == [[(0x2800_1000, 77)]]


def test_6_8_2_3_function_mask_and_bus_mastering(bench: Bench, driver: PciDriver) -> None:
    msix = driver.function.msix
    assert msix is not None
    driver.set_config(driver.msix_at + 2, 2, 0xC000)
    msix.fire(0)
    driver.set_config(driver.msix_at + 2, 2, 0x8000)
    assert bench.interrupts == 1
    driver.set_config(cfg.COMMAND, 2, cfg.MEMORY_ENABLE)
    msix.fire(0)
    assert bench.interrupts == 1, "an MSI is a store of the function's"
    driver.set_config(cfg.COMMAND, 2, cfg.MEMORY_ENABLE | cfg.BUS_MASTER)
    assert bench.interrupts == 2


def test_6_8_2_9_reserved_bits_and_odd_accesses(driver: PciDriver) -> None:
    driver.bar_write(0x800C, 4, 0xFFFF_FFFF)
    assert driver.bar_read(0x800C, 4) == 1
    driver.bar_write(0x8000, 2, 0xFFFF)
    driver.bar_write(0x8002, 4, 0xFFFF_FFFF)
    assert driver.bar_read(0x8000, 8) == 0x2800_0000
    driver.bar_write(0x8800, 8, 0xFF)
    assert driver.bar_read(0x8800, 8) == 0, "pending bits are read-only"
    assert driver.bar_read(0x8020, 4) == 0, "behind the table"


def test_without_msi_the_capability_is_not_there(bench: Bench) -> None:
    function = VirtioPci("disk", bench.memory, VirtioBlk("disk", bench.image()), None)
    host = bench.host()
    host.attach(function, 2)
    driver = PciDriver(function, bench.memory, host, msix=False)
    assert 0x11 not in [identifier for _, identifier in capabilities(driver)]
    driver.start()
    driver.queues[0].add([struct.pack("<IIQ", 0, 0, 0)], [512, 1])
    driver.queues[0].kick()
    assert bench.wires[2].level
    assert driver.read(mmio.INTERRUPT_STATUS) == pci.QUEUE_INTERRUPT
    assert not bench.wires[2].level, "4.1.4.5: reading the ISR status takes the interrupt back"
    assert driver.read(mmio.INTERRUPT_STATUS) == 0


# -- virtio ----------------------------------------------------------------------------------------


def test_4_1_2_1_identity(driver: PciDriver) -> None:
    assert driver.config(cfg.VENDOR_ID, 4) == 0x1044_1AF4
    assert driver.config(cfg.REVISION, 1) >= 1
    assert driver.config(cfg.SUBSYSTEM, 2) >= 0x40


def test_4_1_4_structures_lie_in_the_bar_and_apart(driver: PciDriver) -> None:
    places = []
    for kind in (pci.COMMON_CFG, pci.ISR_CFG, pci.DEVICE_CFG, pci.NOTIFY_CFG):
        bar, offset, at = driver.structures[kind]
        length = driver.config(at + 12, 4)
        assert bar == 4
        places.append((offset, offset + length))
        assert driver.config(at + 2, 1) == (20 if kind == pci.NOTIFY_CFG else 16)
    places.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    assert places[-1][1] <= pci.BAR_SIZE


def test_4_1_4_3_vectors_that_are_not_there_read_back_as_none(driver: PciDriver) -> None:
    driver.bar_write(pci.CONFIG_MSIX_VECTOR, 2, 1)
    assert driver.bar_read(pci.CONFIG_MSIX_VECTOR, 2) == 1
    driver.bar_write(pci.CONFIG_MSIX_VECTOR, 2, 9)
    assert driver.bar_read(pci.CONFIG_MSIX_VECTOR, 2) == pci.NO_VECTOR
    driver.write(mmio.QUEUE_SEL, 0)
    driver.bar_write(pci.QUEUE_MSIX_VECTOR, 2, 0)
    assert driver.bar_read(pci.QUEUE_MSIX_VECTOR, 2) == 0
    driver.write(mmio.STATUS, 0)
    assert driver.bar_read(pci.QUEUE_MSIX_VECTOR, 2) == pci.NO_VECTOR


def test_4_1_4_3_1_queues_that_are_not_there_have_size_zero(driver: PciDriver) -> None:
    driver.write(mmio.QUEUE_SEL, 1)
    assert driver.bar_read(pci.QUEUE_SIZE, 2) == 0
    driver.bar_write(pci.QUEUE_SIZE, 2, 8)
    driver.bar_write(pci.QUEUE_ENABLE, 2, 1)
    assert driver.bar_read(pci.QUEUE_ENABLE, 2) == 0


def test_4_1_3_1_fields_have_their_width(driver: PciDriver) -> None:
    before = driver.function.counters.get("bad_access", 0)
    for offset, size in ((pci.DEVICE_STATUS, 4), (pci.QUEUE_SIZE, 4), (pci.DEVICE_FEATURE, 2), (0x3C, 4), (0x800, 4)):
        assert driver.bar_read(offset, size) == 0
        driver.bar_write(offset, size, 0xFF)
    assert driver.function.counters["bad_access"] == before + 10
    driver.bar_write(pci.QUEUE_DESC, 8, 0x1_2345_6780)
    assert driver.bar_read(pci.QUEUE_DESC + 4, 4) == 1
    assert driver.bar_read(pci.QUEUE_DESC, 8) == 0x1_2345_6780


def test_4_1_4_9_window_in_configuration_space(driver: PciDriver) -> None:
    _, _, at = driver.structures[pci.PCI_CFG]

    def aim(bar: int, offset: int, length: int) -> None:
        for field, size, value in ((4, 1, bar), (8, 4, offset), (12, 4, length)):
            driver.set_config(at + field, size, value)

    aim(4, pci.DEVICE_STATUS, 1)
    driver.set_config(at + 16, 1, 1)
    assert driver.read(mmio.STATUS) == 1
    assert driver.config(at + 16, 1) == 1
    aim(4, pci.NUM_QUEUES, 2)
    assert driver.config(at + 16, 2) == 1
    for bar, offset, length in ((4, 0x3FFF, 4), (7, 0, 4), (4, 0, 3), (4, 1, 4), (4, 0xFFFF_FFFC, 4)):
        aim(bar, offset, length)
        driver.set_config(at + 16, 4, 0)
        driver.config(at + 16, 4)
    assert driver.function.counters["bad_window"] == 10
    assert driver.read(mmio.STATUS) == 1


def test_2_6_1_one_queue_is_reset(driver: PciDriver) -> None:
    driver.start()
    driver.queues[0].add([], [16])
    driver.write(mmio.QUEUE_SEL, 0)
    driver.write(mmio.QUEUE_RESET, 1)
    assert driver.bar_read(pci.QUEUE_RESET, 2) == 0
    assert driver.bar_read(pci.QUEUE_ENABLE, 2) == 0
    driver.queues[0].kick()
    assert driver.queues[0].returned() == []
    assert not driver.needs_reset


class Bells:
    """Doorbells that remember where they are."""

    def __init__(self) -> None:
        self.places: list[int | None] = []

    def make(self, callback: object, length: int) -> Bells.Bell:
        self.places.append(None)
        return Bells.Bell(self, len(self.places) - 1)

    class Bell:
        def __init__(self, bells: Bells, index: int) -> None:
            self._bells, self._index = bells, index

        def place(self, address: int | None) -> None:
            self._bells.places[self._index] = address


def test_doorbells_move_with_the_bar(bench: Bench) -> None:
    bells = Bells()
    function = VirtioPci("rng", bench.memory, VirtioRng("rng"), bench.vector, bells.make)
    host = bench.host()
    host.attach(function, 1)
    assert bells.places == [None]
    driver = PciDriver(function, bench.memory, host)
    assert bells.places == [driver.base + pci.NOTIFY]
    driver.set_config(cfg.BARS + 16, 8, 0x4_0000_0000)
    assert bells.places == [0x4_0000_0000 + pci.NOTIFY]
    driver.set_config(cfg.BARS + 16, 8, 0x8000_0000)
    assert bells.places == [None], "no window reaches it"
    function.reset()
    assert bells.places == [None]


def test_state_of_another_function_is_refused(bench: Bench, driver: PciDriver) -> None:
    state = driver.start().device.save()
    other = VirtioPci("disk", bench.memory, VirtioBlk("disk", bench.image()), bench.vector)
    with pytest.raises(StateError, match="another kind"):
        other.restore(state)
    without = VirtioPci("rng", bench.memory, VirtioRng("rng"), None)
    with pytest.raises(StateError):
        without.restore(state)


def test_restored_functions_answer_and_interrupt(bench: Bench, driver: PciDriver) -> None:
    state = decode_state(VirtioPci.State, encode_state(driver.start().device.save()))
    copy = VirtioPci("rng", bench.memory, VirtioRng("rng"), bench.vector)
    host = bench.host()
    host.attach(copy, 1)
    copy.restore(state)
    driver.queues[0].add([], [16])
    before = bench.interrupts
    host.windows[1].write(driver.base - 0x4000_0000 + pci.NOTIFY, 2, 0)
    assert driver.queues[0].returned() == [(0, 16)]
    assert bench.interrupts == before + 1


@pytest.mark.parametrize("seed", range(4))
def test_random_accesses_to_everything_never_raise(bench: Bench, seed: int) -> None:
    """Several functions, BARs wherever the guest likes (on top of each other too), all windows and the ECAM."""
    choice = random.Random(seed)
    host = bench.host()
    functions = [
        VirtioPci("disk", bench.memory, VirtioBlk("disk", bench.image(), queues=2), bench.vector, Bells().make),
        VirtioPci("rng", bench.memory, VirtioRng("rng"), bench.vector, Bells().make),
        VirtioPci("net", bench.memory, VirtioNet("net", NetBackend("none"), bytes(6)), None, Bells().make),
    ]
    for slot, function in enumerate(functions, 1):
        host.attach(function, slot)
    places = [0x4000_0000, 0x4000_1000, 0x4000_0800, 0x7FFF_F000, 0xFFFF_F000, 0, 0x8000_0000]
    for _ in range(6000):
        size = choice.choice((1, 2, 4, 4, 8))
        value = choice.choice((0, 1, 2, 7, 0x8007, 0xFFFF_FFFF, choice.choice(places), choice.getrandbits(64)))
        if choice.random() < 0.5:
            at = choice.randrange(5) << 15 | choice.choice((4, 0x10, 0x14, 0x20, 0x24, choice.randrange(0, 256, 2)))
            host.write(at, size, value)
            assert 0 <= host.read(at, size) < 1 << 8 * size
        else:
            window = choice.choice(host.windows)
            register = choice.choice((0, 0x14, 0x16, 0x1C, 0x1000, 0x3000, choice.randrange(0x4000)))
            at = choice.choice((0, 0x1000, 0x800)) + register
            window.write(at, size, value)
            assert 0 <= window.read(at, size) < 1 << 8 * size
    for function in functions:
        copy = decode_state(VirtioPci.State, encode_state(function.save()))
        function.restore(copy)
        function.reset()
    assert not any(line.level for line in bench.wires)
