"""The device tree of whole machines under dtc, and loading of kernels good and bad into real memory."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from qemu_user.config.machine_config import Boot
from qemu_user.devices.memory import GuestMemory, OutOfRange
from qemu_user.devices.syscon import Syscon
from qemu_user.machine import boot, virt
from qemu_user.machine.bus import Bus
from qemu_user.machine.cpu import Isa
from qemu_user.machine.fdt import flatten
from qemu_user.machine.tree import machine_tree
from tests.framework.devices import BUILDERS, Bench
from tests.framework.virtio_driver import RAM_BASE, make_memory

ISA = Isa(["i", "m", "a", "f", "d", "c", "zicsr", "zba"], "riscv,sv48", 10_000_000, {"cbom": 64})


def test_map_has_no_overlap() -> None:
    bus = Bus()
    for entry in virt.MAP:
        if entry.name not in ("ram",):
            bus.add(entry.base, entry.size, Syscon(entry.name, lambda what, status: None))
    with pytest.raises(ValueError, match="overlaps"):
        bus.add(virt.PLACES["uart"].base + 8, 8, Syscon("x", lambda what, status: None))
    irqs = [entry.irq for entry in virt.MAP if entry.irq]
    assert len(irqs) == len(set(irqs))


def test_unassigned_addresses_read_as_zero() -> None:
    bus = Bus()
    assert bus.read(0x1234, 8) == 0
    bus.write(0x1234, 4, 1)
    assert bus.counters == {"unassigned_reads": 1, "unassigned_writes": 1}


def test_isa_string() -> None:
    assert ISA.text == "rv64imafdc_zicsr_zba"


@pytest.mark.parametrize("cpus", [1, 8])
@pytest.mark.skipif(shutil.which("dtc") is None, reason="needs dtc (apt install device-tree-compiler)")
def test_whole_tree_is_clean_under_dtc(cpus: int, tmp_path: Path) -> None:
    from qemu_user.devices.device import Place
    from qemu_user.machine.irq import PHANDLE_CONTROLLER, PHANDLE_CPU, PHANDLE_TEST

    bench = Bench(tmp_path)
    nodes = []
    for name, place in (("ns16550a", "uart"), ("goldfish_rtc", "rtc"), ("virtio_mmio", "virtio0")):
        entry = virt.PLACES[place]
        nodes.append(BUILDERS[name](bench).fdt_node(Place(entry.base, entry.size, [entry.irq], PHANDLE_CONTROLLER)))
    test = virt.PLACES["test"]
    nodes.append(BUILDERS["syscon"](bench).fdt_node(Place(test.base, test.size, [], 0, PHANDLE_TEST)))
    from qemu_user.devices.plic import Plic

    plic = virt.PLACES["plic"]
    controllers = [PHANDLE_CPU + 2 * cpu for cpu in range(cpus)]
    device = Plic("plic", cpus, lambda context, level: None, controllers)
    nodes.append(device.fdt_node(Place(plic.base, plic.size, [], 0, PHANDLE_CONTROLLER)))
    blob = flatten(machine_tree(cpus, ISA, 1 << 30, nodes, "console=ttyS0", (0x84000000, 0x84001000)))
    done = subprocess.run(["dtc", "-I", "dtb", "-O", "dts", "-"], input=blob, capture_output=True, check=True)
    assert done.stderr == b"", done.stderr.decode()
    text = done.stdout.decode()
    assert 'bootargs = "console=ttyS0"' in text
    assert text.count('device_type = "cpu"') == cpus


# -- booting ---------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> GuestMemory:
    return make_memory(64 << 20)[0]


def _file(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "kernel"
    path.write_bytes(data)
    return str(path)


def _image(offset: int, size: int, body: bytes = b"\x13\0\0\0" * 64) -> bytes:
    return struct.pack("<IIQQQIIQ8s4sI", 0x5A4D, 0, offset, size, 0, 2, 0, 0, b"RISCV\0\0\0", b"RSC\5", 0) + body


@pytest.mark.parametrize("offset", [0, 0x200000, 0x80000, 0x201000])
def test_flat_image(memory: GuestMemory, tmp_path: Path, offset: int) -> None:
    data = _image(offset, 1 << 20)
    loaded = boot.load_kernel(_file(tmp_path, data), memory)
    assert loaded == (RAM_BASE + offset, RAM_BASE + offset + (1 << 20))
    assert memory.read(loaded.entry, len(data)) == data


def test_raw_binary_goes_where_u_boot_is_linked(memory: GuestMemory, tmp_path: Path) -> None:
    assert boot.load_kernel(_file(tmp_path, b"\x13\0\0\0" * 100), memory).entry == 0x80200000


def _elf(segments: list[tuple[int, int, bytes, int]], entry: int, machine: int = 243) -> bytes:
    """segments: (virtual, physical, contents, size in memory)."""
    at = 64 + 56 * len(segments)
    table, body = b"", b""
    for virtual, physical, data, size in segments:
        table += struct.pack("<IIQQQQQQ", 1, 7, at + len(body), virtual, physical, len(data), size, 4096)
        body += data
    ident = b"\x7fELF\2\1\1" + bytes(9)
    head = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, machine, 1, entry, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    return head + table + body


def test_elf(memory: GuestMemory, tmp_path: Path) -> None:
    memory.write(RAM_BASE + 0x1000, b"\xff" * 0x2000)
    path = _file(tmp_path, _elf([(0xFFFF0000, RAM_BASE + 0x1000, b"code", 0x1000)], 0xFFFF0010))
    loaded = boot.load_kernel(path, memory)
    assert loaded == (RAM_BASE + 0x1010, RAM_BASE + 0x2000)
    assert memory.read(RAM_BASE + 0x1000, 0x1000) == b"code" + bytes(0x1000 - 4)
    assert memory.read(RAM_BASE + 0x2000, 1) == b"\xff"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x1f\x8b" + bytes(100), "gzip"),
        (b"\x7fELF" + bytes(20), "cut short"),
        (_elf([(0, RAM_BASE, b"x", 16)], 0, machine=62), "RISC-V"),
        (_elf([], RAM_BASE), "nothing to load"),
        (_elf([(0, 0x1000, b"x", 16)], 0), "memory"),
        (_elf([(0, RAM_BASE, b"x", 1 << 40)], 0), "memory"),
        (_elf([(0, RAM_BASE, b"xxxx", 2)], 0), "segment"),
        (_elf([(0, RAM_BASE, b"x", 16)], 0)[:100], "cut short"),
        (_image(1 << 40, 0), "memory"),
        (_image(0, 1 << 40), "memory"),
    ],
)
def test_bad_kernels_are_refused(memory: GuestMemory, tmp_path: Path, data: bytes, says: str) -> None:
    with pytest.raises(boot.BootError, match=says):
        boot.load_kernel(_file(tmp_path, data), memory)


def test_initrd_and_what_is_appended(memory: GuestMemory, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"12345")
    kernel = boot.Loaded(0x80200000, 0x80400000)
    limit = boot.tree_address(memory, 5000)
    assert limit % (2 << 20) == 0
    start, end = boot.load_initrd(Boot(initrd=str(initrd), initrd_extra=b"more"), memory, kernel, limit)
    assert start >= kernel.end
    assert end <= limit
    assert memory.read(start, end - start) == b"12345\0\0\0more"
    module = tmp_path / "module"
    module.write_bytes(b"6")
    whole = Boot(initrd=str(initrd), initrd_files=(str(module), str(initrd)), initrd_extra=b"more")
    memory.write(start, b"x" * 64)
    start, end = boot.load_initrd(whole, memory, kernel, limit)
    assert memory.read(start, end - start) == b"12345\0\0\0" b"6\0\0\0" b"12345\0\0\0more"
    (tmp_path / "module").unlink()
    with pytest.raises(boot.BootError, match="module"):
        boot.load_initrd(whole, memory, kernel, limit)
    assert boot.load_initrd(Boot(), memory, kernel, limit) == (0, 0)
    with pytest.raises(boot.BootError, match="do not fit"):
        boot.load_initrd(Boot(initrd_extra=bytes(64 << 20)), memory, kernel, limit)


def test_memory_refuses_what_lies_outside(memory: GuestMemory) -> None:
    for gpa, length in ((RAM_BASE - 1, 2), (RAM_BASE + (64 << 20) - 1, 2), (0, 1), (RAM_BASE, -1), (1 << 64, 1)):
        with pytest.raises(OutOfRange):
            memory.view(gpa, length)
