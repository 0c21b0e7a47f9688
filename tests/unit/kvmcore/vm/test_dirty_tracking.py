"""The dirty log in its modes, and the rings (KVM_ABI 1.8), with writes that kvmcore itself makes."""

from __future__ import annotations

import struct
from errno import E2BIG, EFAULT, EINVAL, ENOENT, ENXIO

import pytest

from kvmcore.vm.dirty import DirtyBitmap, DirtyRing
from protocol.abi.errors import KvmError
from protocol.channel.shared_memory import PAGE, Mapping

POINTEE = 0x7001_0000  # where conftest puts pointees

HVA, GPA = 0x10_0000, 0x8000_0000


def log(kernel, slot=0, pages=128):
    kernel.ioctl(kernel.vm, "GET_DIRTY_LOG", bytes(pages // 8), slot=slot, dirty_bitmap=POINTEE)
    return int.from_bytes(kernel.pointee, "little")


def clear(kernel, first, pages, bits, slot=0):
    return kernel.errno(
        kernel.vm, "CLEAR_DIRTY_LOG", bits.to_bytes(16, "little"),
        slot=slot, num_pages=pages, first_page=first, dirty_bitmap=POINTEE,
    )  # fmt: skip


def enable(kernel, cap, value):
    return kernel.errno(kernel.vm, "ENABLE_CAP", cap=cap, args=[value, 0, 0, 0])


def logging_slot(kernel, pages=100):
    kernel.map(HVA, pages * PAGE)
    assert kernel.region(0, GPA, pages * PAGE, HVA, 1) == 0


def test_get_and_clear(kernel):
    logging_slot(kernel)
    kernel.vm.memory.write(GPA + 3 * PAGE, b"x" * (PAGE + 1))
    kernel.vm.memory.write(GPA + 99 * PAGE, b"x")
    assert log(kernel) == 1 << 3 | 1 << 4 | 1 << 99
    assert log(kernel) == 0


def test_errors(kernel):
    kernel.map(HVA, 4 * PAGE)
    assert kernel.region(0, GPA, 4 * PAGE, HVA) == 0
    get = lambda slot, address=POINTEE: kernel.errno(  # noqa: E731
        kernel.vm, "GET_DIRTY_LOG", bytes(8), slot=slot, dirty_bitmap=address
    )
    assert get(0) == ENOENT
    assert get(5) == ENOENT
    assert get(65536) == EINVAL
    assert kernel.region(0, GPA, 4 * PAGE, HVA, 1) == 0
    kernel.vm.memory.write(GPA, b"x")
    assert get(0, 0) == EFAULT
    assert log(kernel, pages=64) == 1  # what could not be delivered is still dirty
    assert kernel.region(0, GPA, 4 * PAGE, HVA) == 0
    assert get(0) == ENOENT


def test_clear_ranges(kernel):
    logging_slot(kernel)
    assert clear(kernel, 1, 64, 0) == EINVAL
    assert clear(kernel, 0, 8, 0) == EINVAL
    assert clear(kernel, 64, 36, 0) == 0
    assert clear(kernel, 64, 37, 0) == EINVAL
    assert clear(kernel, 128, 0, 0) == EINVAL
    assert clear(kernel, 0, 0, 0) == 0
    assert clear(kernel, 0, 64, 0, slot=9) == ENOENT


def test_manual_mode(kernel):
    for value in (2, 4, 6):
        assert enable(kernel, 168, value) == EINVAL
    assert enable(kernel, 168, 1) == 0
    logging_slot(kernel)
    for page in (0, 65, 70):
        kernel.vm.memory.write(GPA + page * PAGE, b"x")
    assert log(kernel) == log(kernel) == 1 | 1 << 65 | 1 << 70
    assert clear(kernel, 64, 36, 1 << 1) == 0
    assert log(kernel) == 1 | 1 << 70


def test_initially_set(kernel):
    assert enable(kernel, 168, 3) == 0
    logging_slot(kernel, 64)
    assert log(kernel, pages=64) == (1 << 64) - 1
    assert clear(kernel, 0, 64, (1 << 64) - 1) == 0
    assert log(kernel, pages=64) == 0


def test_initially_set_are_the_slots_own_pages(kernel):
    """Found beside a real KVM: what is left of the last word is 0."""
    assert enable(kernel, 168, 3) == 0
    logging_slot(kernel, 70)
    assert log(kernel, pages=128) == (1 << 70) - 1


def test_unaligned_parts_are_gathered():
    bitmap = DirtyBitmap(200)
    side = bitmap.part(70, 100)
    struct.pack_into("<Q", (_at(side, 16)), 8, 1 << 3)
    assert bitmap.part(128, 10) == bitmap.part(0, 1) + 16
    bitmap.gather()
    assert int.from_bytes(bitmap.get(), "little") == 1 << (70 + 64 + 3)


def _at(address, size):
    import ctypes

    return (ctypes.c_char * size).from_address(address)


def test_new_since_is_limited_and_complete():
    bitmap, shadow = DirtyBitmap(100_000), bytearray(12_512)
    wanted = [0, 5, 64, 40_000, 99_999]
    for page in wanted:
        bitmap.set_range(page, page)
    assert bitmap.new_since(shadow, 3) == wanted[:3]
    assert bitmap.new_since(shadow, 9) == wanted[3:]
    assert bitmap.new_since(shadow, 9) == []


def test_ring_sizes(kernel):
    for size, errno in (
        (100, EINVAL),
        (0, EINVAL),
        (512, EINVAL),
        (1 << 30, E2BIG),
        (4096, 0),
        (4096, EINVAL),
    ):
        assert enable(kernel, 223, size) == errno
    logging_slot(kernel)
    assert kernel.errno(kernel.vm, "GET_DIRTY_LOG", bytes(16), slot=0, dirty_bitmap=POINTEE) == ENXIO
    assert clear(kernel, 0, 64, 0) == ENXIO
    assert kernel.call(kernel.vm, "RESET_DIRTY_RINGS") == 0


def test_reset_without_rings(kernel):
    with pytest.raises(KvmError) as refused:
        kernel.call(kernel.vm, "RESET_DIRTY_RINGS")
    assert refused.value.errno == EINVAL


def test_ring_entries():
    ring = DirtyRing(4096, "unit")
    theirs = Mapping([(ring.fd, 0, 4096)]).view
    for page in range(192):
        ring.push(1, page)
    assert ring.full
    assert struct.unpack_from("<IIQ", theirs, 16 * 7) == (1, 1, 7)
    assert ring.take_harvested() == []
    for index in (0, 1, 3):
        struct.pack_into("<I", theirs, 16 * index, 3)
    struct.pack_into("<Q", theirs, 8, 12345)  # their copy is theirs: we know what we pushed
    assert ring.take_harvested() == [(1, 0), (1, 1)]
    assert struct.unpack_from("<I", theirs, 0) == (0,)
    assert not ring.full
    ring.close()


def test_flags_of_a_ring_are_not_looked_at(kernel):
    """Found by fuzzing Linux 6.18: its generic code checks the flags of the other capabilities alone."""
    assert kernel.errno(kernel.vm, "ENABLE_CAP", cap=168, flags=1, args=[1, 0, 0, 0]) == EINVAL
    assert kernel.errno(kernel.vm, "ENABLE_CAP", cap=223, flags=1, args=[65536, 0, 0, 0]) == 0
    assert kernel.vm.memory.dirty.ring_bytes == 65536
