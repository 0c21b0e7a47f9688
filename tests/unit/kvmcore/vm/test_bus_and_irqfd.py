"""ioeventfds, coalesced zones and irqfds (KVM_ABI 1.9): errors, matching, delivery."""

from __future__ import annotations

import os
import struct
import threading
import time
from errno import EBADF, EBUSY, EEXIST, EINVAL, ENOENT, ENOSPC, ENXIO

import pytest

ADDR = 0x1000_0000


def ioeventfd(kernel, number, addr=ADDR, length=4, flags=0, match=0):
    return kernel.errno(
        kernel.vm, "IOEVENTFD", fd=number, addr=addr, len=length, flags=flags, datamatch=match
    )


def count(fd):
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def test_ioeventfd_errors(kernel):
    number, _ = kernel.eventfd()
    assert ioeventfd(kernel, number) == 0
    assert ioeventfd(kernel, number) == EEXIST
    assert ioeventfd(kernel, number, length=2) == 0
    assert ioeventfd(kernel, number, length=0) == EEXIST
    for length in (3, 16):
        assert ioeventfd(kernel, number, length=length) == EINVAL
    assert ioeventfd(kernel, number, ADDR + 8, flags=1, match=5) == 0
    assert ioeventfd(kernel, number, ADDR + 8, flags=1, match=6) == 0
    assert ioeventfd(kernel, number, ADDR + 16, length=0, flags=1) == EINVAL
    assert ioeventfd(kernel, number, flags=0x100) == EINVAL
    assert ioeventfd(kernel, -1) == EBADF
    assert ioeventfd(kernel, kernel.number) == EINVAL
    assert ioeventfd(kernel, number, (1 << 64) - 2) == EINVAL
    assert ioeventfd(kernel, number, flags=2) == 0
    assert ioeventfd(kernel, number, flags=4) == 0
    assert ioeventfd(kernel, number, flags=4) == ENOENT


def test_ioeventfd_matching(kernel):
    (any_length, one), (exact, two), (matched, three) = (kernel.eventfd() for _ in range(3))
    assert ioeventfd(kernel, any_length, length=0) == 0
    assert ioeventfd(kernel, exact, ADDR + 4) == 0
    assert ioeventfd(kernel, matched, ADDR + 8, length=8, flags=1, match=7) == 0
    write = kernel.vm.eventfds.write
    assert write(ADDR, b"\1")
    assert write(ADDR, bytes(8))
    assert count(one) == 2
    assert not write(ADDR + 4, b"12")
    assert write(ADDR + 4, b"1234")
    assert count(two) == 1
    assert not write(ADDR + 8, (8).to_bytes(8, "little"))
    assert write(ADDR + 8, (7).to_bytes(8, "little"))
    assert count(three) == 1


def test_an_ioeventfd_that_is_taken_away_under_a_signal(kernel, monkeypatch):
    """Found by the fuzzer: a vCPU's thread wrote to a descriptor that was closed between its look and its write."""
    number, fd = kernel.eventfd()
    assert ioeventfd(kernel, number) == 0
    (event,) = kernel.vm.eventfds._events[ADDR]
    write, seen = os.eventfd_write, []

    def write_late(target, value):
        assert ioeventfd(kernel, number, flags=4) == 0
        seen.append(os.fstat(target))  # still ours
        write(target, value)

    monkeypatch.setattr(os, "eventfd_write", write_late)
    assert kernel.vm.eventfds.write(ADDR, b"1234")
    assert len(seen) == count(fd) == 1
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(event.signal.fd)
    stranger = os.dup2(fd, event.signal.fd)  # the number is given out again
    assert not event.signal.send()
    assert count(fd) == 0
    os.close(stranger)


def test_a_resample_eventfd_that_is_full_keeps_only_its_vcpu_waiting(kernel):
    full = os.eventfd((1 << 32) - 1)
    os.eventfd_write(full, (1 << 64) - (1 << 32) - 1)
    kernel.session.table.pass_file(90, os.dup(full))
    number, _ = kernel.eventfd()
    other, _ = kernel.eventfd()
    assert irqfd(kernel, number, flags=2, resample=90) == 0
    vcpu = threading.Thread(target=kernel.vm.eventfds.irqfds.end_of_interrupt, args=(5,), daemon=True)
    vcpu.start()
    (registered,) = kernel.vm.eventfds.irqfds._irqfds
    while not registered.resample._writers:
        time.sleep(0.001)
    client = threading.Thread(target=lambda: (irqfd(kernel, other, gsi=6), irqfd(kernel, number, flags=1)), daemon=True)
    client.start()
    client.join(60)
    assert not client.is_alive()
    assert [each.gsi for each in kernel.vm.eventfds.irqfds._irqfds] == [6]
    os.eventfd_read(full)
    vcpu.join(60)
    assert not vcpu.is_alive()
    os.close(full)


def zone(kernel, addr=ADDR, size=16, pio=0, name="REGISTER_COALESCED_MMIO"):
    return kernel.errno(kernel.vm, name, addr=addr, size=size, pio=pio)


def test_coalesced_ring(kernel):
    assert zone(kernel, pio=2) == EINVAL
    assert zone(kernel) == zone(kernel) == zone(kernel, size=0) == 0
    write = kernel.vm.eventfds.write
    assert write(ADDR + 4, b"\x78\x56\x34\x12")
    assert write(ADDR + 12, b"abcd")
    assert not write(ADDR + 14, b"abcd")
    ring = kernel.vm.ring.view
    assert struct.unpack_from("<IIQII8s", ring) == (0, 2, ADDR + 4, 4, 0, b"\x78\x56\x34\x12\0\0\0\0")
    struct.pack_into("<I", ring, 4, 1 << 30)  # the client scribbles on `last`
    assert not write(ADDR, b"abcd")
    struct.pack_into("<II", ring, 0, 0, 0)
    assert sum(write(ADDR, b"abcd") for _ in range(200)) == 169
    assert zone(kernel, name="UNREGISTER_COALESCED_MMIO") == 0
    assert zone(kernel, name="UNREGISTER_COALESCED_MMIO") == 0
    assert not write(ADDR, b"abcd")


def test_a_datamatch_wins_over_a_longer_zone_at_its_address(kernel):
    number, fd = kernel.eventfd()
    assert zone(kernel) == 0
    assert ioeventfd(kernel, number, flags=1, match=1) == 0
    assert kernel.vm.eventfds.write(ADDR, (1).to_bytes(4, "little"))
    assert count(fd) == 1
    assert kernel.vm.eventfds.write(ADDR, (2).to_bytes(4, "little"))
    assert struct.unpack_from("<II", kernel.vm.ring.view) == (0, 1)


def test_a_full_bus(kernel):
    for _ in range(1000):
        assert zone(kernel) == 0
    assert zone(kernel) == ENOSPC
    number, _ = kernel.eventfd()
    assert ioeventfd(kernel, number) == ENOSPC
    assert ioeventfd(kernel, number, flags=2) == 0


def irqfd(kernel, number, gsi=5, flags=0, resample=0):
    return kernel.errno(kernel.vm, "IRQFD", fd=number, gsi=gsi, flags=flags, resamplefd=resample)


def test_irqfd_errors(kernel):
    number, fd = kernel.eventfd()
    other, _ = kernel.eventfd()
    assert irqfd(kernel, number, flags=4) == EINVAL
    assert irqfd(kernel, number, flags=1) == 0
    assert irqfd(kernel, number) == 0
    assert irqfd(kernel, number, gsi=6) == EBUSY
    assert irqfd(kernel, 0xFFFFFFFF) == EBADF
    assert irqfd(kernel, kernel.number) == EINVAL
    assert irqfd(kernel, other, gsi=5000, flags=2, resample=0xFFFFFFFF) == EBADF
    assert irqfd(kernel, other, gsi=5000, flags=2, resample=number) == 0
    os.eventfd_write(fd, 1)
    kernel.turn()  # no irqchip: drained and dropped
    assert count(fd) == 0
    assert irqfd(kernel, number, flags=1) == 0
    assert irqfd(kernel, number) == 0


def test_lines_without_an_irqchip(kernel):
    assert kernel.errno(kernel.vm, "IRQ_LINE", irq=5, level=1) == ENXIO
    assert kernel.errno(kernel.vm, "SIGNAL_MSI", address_lo=0x28000000, data=1) == EINVAL
