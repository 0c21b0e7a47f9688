"""Memslots (KVM_ABI 1.7) and guest_memfd (1.13): every row of the tables, resolution to host memory."""

from __future__ import annotations

from errno import EBADF, EEXIST, EFAULT, EINVAL, ENODEV, EPERM

import pytest

from protocol.abi.errors import KvmError
from protocol.channel.shared_memory import PAGE, PROT_READ, Mapping

HVA, GPA = 0x10_0000, 0x8000_0000
LOG, READONLY, GMEM = 1, 2, 4


def test_create_change_move_delete(kernel):
    kernel.map(HVA, 0x10000)
    assert kernel.region(0, GPA, 0x4000, HVA) == 0
    assert kernel.region(0, GPA, 0x4000, HVA) == 0
    assert kernel.region(0, GPA, 0x8000, HVA) == EINVAL
    assert kernel.region(0, GPA, 0x4000, HVA + PAGE) == EINVAL
    assert kernel.region(0, GPA + 0x4000, 0x4000, HVA) == 0
    assert kernel.region(0, GPA, 0x4000, HVA, LOG) == 0
    assert kernel.region(0, GPA, 0x4000, HVA, READONLY) == EINVAL
    assert kernel.region(1, GPA + 0x3000, 0x4000, HVA) == EEXIST
    assert kernel.region(1, GPA + 0x4000, 0x4000, HVA) == 0
    assert kernel.region(1, GPA, 0x4000, HVA) == EEXIST
    assert kernel.region(0, 0, 0, 0) == 0
    assert kernel.region(0, 0, 0, 0) == EINVAL
    assert kernel.vm.memory.lookup(GPA) is None
    assert kernel.vm.memory.lookup(GPA + 0x4000) is kernel.vm.memory.slot(1)


@pytest.mark.parametrize(
    ("slot", "flags", "gpa", "size", "hva", "errno"),
    [
        (0, 16, GPA, PAGE, HVA, EINVAL),
        (0, 0, GPA, PAGE + 1, HVA, EINVAL),
        (0, 0, GPA + 1, PAGE, HVA, EINVAL),
        (0, 0, GPA, PAGE, HVA + 1, EINVAL),
        (0, 0, GPA, PAGE, 1 << 63, EINVAL),
        (0, 0, (1 << 64) - PAGE, PAGE, HVA, EINVAL),
        (65536, 0, GPA, PAGE, HVA, EINVAL),
        (32767, 0, GPA, PAGE, HVA, EINVAL),
        (32766, 0, GPA, PAGE, HVA, 0),
        (0, 0, GPA, 1 << 43, 0, EINVAL),
        (0, LOG | READONLY, GPA, PAGE, HVA, 0),
        (0, GMEM | READONLY, GPA, PAGE, HVA, EINVAL),
        (0, 0, 1 << 56, PAGE, HVA, 0),
        (0, 0, 1 << 59, PAGE, HVA, EFAULT),
    ],
)
def test_checks(kernel, slot, flags, gpa, size, hva, errno):
    kernel.map(HVA, 0x10000)
    assert kernel.region(slot, gpa, size, hva, flags) == errno


def test_version_one_knows_no_guest_memfd(kernel):
    members = {"slot": 0, "flags": GMEM, "guest_phys_addr": GPA, "memory_size": PAGE, "userspace_addr": HVA}
    assert kernel.errno(kernel.vm, "SET_USER_MEMORY_REGION", **members) == EINVAL


def test_read_only_user_memory(kernel):
    kernel.map(HVA, 0x4000, PROT_READ)
    assert kernel.region(0, GPA, 0x4000, HVA) == EPERM
    assert kernel.region(0, GPA, 0x4000, HVA, READONLY) == 0
    with pytest.raises(KvmError) as refused:
        kernel.vm.memory.write(GPA, b"x")
    assert refused.value.errno == EFAULT


def test_a_slot_over_segments_and_holes(kernel):
    first, second = kernel.map(HVA, 0x2000), kernel.map(HVA + 0x3000, 0x1000)
    assert kernel.region(0, GPA, 0x5000, HVA) == 0
    slot = kernel.vm.memory.slot(0)
    assert [(piece.gpa - GPA, piece.size, bool(piece.host)) for piece in slot.pieces] == [
        (0, 0x2000, True), (0x2000, 0x1000, False), (0x3000, 0x1000, True), (0x4000, 0x1000, False),
    ]  # fmt: skip
    kernel.vm.memory.write(GPA + 0x3010, b"second")
    assert bytes(Mapping([(second, 0, 0x1000)]).view[0x10:0x16]) == b"second"
    with pytest.raises(KvmError):
        kernel.vm.memory.read(GPA + 0x1FFF, 2)
    # Mapping the hole later makes the slot whole: the client's address space is looked at again.
    kernel.map(HVA + 0x2000, 0x1000)
    kernel.vm.memory.write(GPA + 0x1FFF, b"ab")
    assert kernel.vm.memory.read(GPA + 0x1FFF, 2) == b"ab"
    assert Mapping([(first, 0, 0x2000)]).view[0x1FFF] == ord("a")
    kernel.session.mm.unmap(HVA, 0x2000)
    assert slot.host(GPA) == 0


def test_guest_memfd(kernel):
    number = kernel.ioctl(kernel.vm, "CREATE_GUEST_MEMFD", size=0x10000, flags=3)
    gmem = kernel.session.lookup(number)
    assert gmem.shared_fds() == [gmem.fd]
    bind = {"guest_memfd": number}
    assert kernel.region(0, GPA, 0x4000, 0, GMEM, guest_memfd_offset=0x4000, **bind) == 0
    kernel.vm.memory.write(GPA, b"shared")
    assert bytes(Mapping([(gmem.fd, 0x4000, PAGE)]).view[:6]) == b"shared"
    assert kernel.region(0, GPA, 0x4000, 0, GMEM, guest_memfd_offset=0x4000, **bind) == EINVAL
    assert kernel.region(0, GPA, 0x4000, 0, GMEM | LOG, guest_memfd_offset=0x4000, **bind) == 0
    assert kernel.region(0, GPA, 0x4000, 0, GMEM, guest_memfd_offset=0x4000, **bind) == 0
    assert kernel.region(1, 0, 0x4000, 0, GMEM, guest_memfd_offset=0x6000, **bind) == EINVAL
    assert kernel.region(1, 0, 0x4000, 0, GMEM, guest_memfd_offset=0xE000, **bind) == EINVAL
    assert kernel.region(1, 0, 0x4000, 0, GMEM, guest_memfd_offset=1, **bind) == EINVAL
    assert kernel.region(1, 0, 0x4000, 0, GMEM, guest_memfd=77) == EBADF
    assert kernel.region(1, 0, 0x4000, 0, GMEM, guest_memfd=kernel.number) == EINVAL
    # The slot keeps the memory when the handle is closed.
    kernel.session.table.close(number)
    assert kernel.vm.memory.read(GPA, 6) == b"shared"
    assert kernel.region(0, GPA, 0, 0) == 0
    assert gmem.fd == -1


@pytest.mark.parametrize(
    ("size", "flags"),
    [(0, 0), (1, 0), (1 << 63, 0), (PAGE, 4)],
    ids=["empty", "unaligned", "negative", "flags"],
)
def test_guest_memfd_checks(kernel, size, flags):
    assert kernel.errno(kernel.vm, "CREATE_GUEST_MEMFD", size=size, flags=flags) == EINVAL


def test_without_the_mmap_flag_it_is_not_shared(kernel):
    gmem = kernel.session.lookup(kernel.ioctl(kernel.vm, "CREATE_GUEST_MEMFD", size=PAGE, flags=0))
    assert gmem.shared_fds() == []


def test_strict_hides_the_extension(strict):
    assert strict.errno(strict.vm, "CREATE_GUEST_MEMFD", size=PAGE, flags=3) == EINVAL
    assert strict.region(0, GPA, PAGE, HVA, GMEM) == EINVAL
    assert strict.call(strict.vm, "CHECK_EXTENSION", 234) == 0


def test_capabilities_that_come_first(kernel):
    enable = lambda cap, value, flags=0: kernel.errno(  # noqa: E731
        kernel.vm, "ENABLE_CAP", cap=cap, flags=flags, args=[value, 0, 0, 0]
    )
    assert enable(207, 60) == EINVAL
    assert enable(207, 45) == 0
    assert kernel.call(kernel.vm, "CHECK_EXTENSION", 207) == 50
    assert kernel.region(0, 1 << 50, PAGE, HVA) == EFAULT
    assert kernel.region(0, GPA, PAGE, HVA) == 0
    assert enable(207, 41) == 16  # EBUSY
    assert enable(182, 1 << 33) == EINVAL
    assert enable(182, 1000, 1) == EINVAL
    assert enable(9999, 0) == EINVAL
    assert enable(192, 4096) == EINVAL


def test_other_device_types(kernel):
    assert kernel.errno(kernel.vm, "CREATE_DEVICE", type=4) == ENODEV
    assert kernel.errno(kernel.vm, "CREATE_DEVICE", type=11, flags=1) == 0
    assert kernel.vm.irqchip is None
