"""What devices write to guest memory is logged by page, while somebody asks for it."""

from __future__ import annotations

from qemu_user.devices.memory import PAGE, GuestMemory


def dirty(memory: GuestMemory) -> list[list[int]]:
    return [[page for page, written in enumerate(log) if written] for log in (each.take() for each in memory.logs)]


def test_pages_of_all_regions() -> None:
    memory = GuestMemory([(0x8000_0000, memoryview(bytearray(8 * PAGE))), (0x1000_0000, memoryview(bytearray(2 * PAGE)))])
    memory.write(0x8000_0000, b"before anybody asked")
    for log in memory.logs:
        log.start()
    assert memory.logging
    memory.write(0x8000_0000 + PAGE - 1, b"ab")
    memory.wrote(0x8000_0000 + 6 * PAGE, 5 * PAGE)
    memory.wrote(0x1000_0000 + PAGE, 0)
    memory.wrote(0x1000_0000, 1)
    assert dirty(memory) == [[0], [0, 1, 6, 7]]
    assert dirty(memory) == [[], []]
    for log in memory.logs:
        log.stop()
    memory.write(0x8000_0000, b"afterwards")
    assert not memory.logging
    assert dirty(memory) == [[], []]


def test_taking_does_not_start() -> None:
    memory = GuestMemory([(0, memoryview(bytearray(PAGE)))])
    memory.wrote(0, 1)
    assert dirty(memory) == [[]]
    assert not memory.logging
