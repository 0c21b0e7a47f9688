"""Indirect tables read in one go (Queue._straight) against the same tables read descriptor by descriptor: random ones, most of
them nearly right. Whatever the first takes, both must agree on; what breaks a rule is refused by both.
"""

from __future__ import annotations

import random
import struct

import pytest

from qemu_user.devices.memory import GuestMemory
from qemu_user.devices.virtio.queue import Chain, Queue, QueueError
from tests.framework.virtio_driver import RAM_BASE, RAM_SIZE, make_memory

NEXT, WRITE, INDIRECT = 1, 2, 4
TABLE = RAM_BASE + 0x8000


class Piecewise(GuestMemory):
    """The same memory, whose users have to ask for each range."""

    flat = None  # type: ignore[assignment]


def queue(memory: GuestMemory) -> Queue:
    made = Queue(0, 8)
    made.indirect = True
    made.descriptors, made.available, made.used = RAM_BASE, RAM_BASE + 0x1000, RAM_BASE + 0x2000
    made.enable(memory)
    return made


def table(random_: random.Random) -> bytes:
    """Up to 12 descriptors, often touching one another, with a mistake now and then."""
    count = random_.randrange(1, 12)
    first_writable = random_.randrange(count + 1)
    at, entries = RAM_BASE + 0x10000, []
    for index in range(count):
        if random_.random() < 0.5:
            at = RAM_BASE + random_.randrange(0x10000, 0x20000)
        size = random_.choice((0, 1, 16, 512, 4096))
        flags = (WRITE if index >= first_writable else 0) | (NEXT if index + 1 < count else 0)
        following = index + 1
        entries.append([at, size, flags, following])
        at += size
    if random_.random() < 0.4:
        entry = random_.choice(entries)
        match random_.randrange(6):
            case 0:
                entry[0] = random_.choice((0, RAM_BASE - 1, RAM_BASE + RAM_SIZE - 8, (1 << 64) - 16))
            case 1:
                entry[1] = random_.choice((RAM_SIZE, 0xFFFFFFFF))
            case 2:
                entry[2] ^= random_.choice((NEXT, WRITE, INDIRECT, 0x100))
            case 3:
                entry[3] = random_.randrange(16)
            case 4:
                entry[2] |= NEXT
            case 5:
                entry[3] = 0
    return b"".join(struct.pack("<QIHH", *entry) for entry in entries)


def take(made: Queue) -> Chain | str:
    try:
        chain = made.pop()
    except QueueError:
        return "broken"
    assert chain is not None
    return chain


@pytest.mark.parametrize("seed", range(8))
def test_both_ways_agree(seed: int) -> None:
    random_ = random.Random(seed)
    memory, mapping = make_memory()
    mapping[0x10000:0x22000] = random_.randbytes(0x12000)
    straight, piecewise = queue(memory), queue(Piecewise(memory.regions))
    used_fast = 0
    for number in range(400):
        content = table(random_)
        mapping[0x8000 : 0x8000 + len(content)] = content
        struct.pack_into("<QIHH", mapping, 0, TABLE, len(content), INDIRECT, 0)
        struct.pack_into("<H", mapping, 0x1004 + 2 * (number % 8), 0)
        found = []
        for made in (straight, piecewise):
            made._next_available = number & 0xFFFF
            struct.pack_into("<H", mapping, 0x1002, (number + 1) & 0xFFFF)
            found.append(take(made))
        one, other = found
        if isinstance(one, str) or isinstance(other, str):
            assert one == other
            continue
        used_fast += len(one.readable) + len(one.writable) < len(other.readable) + len(other.writable)
        assert b"".join(one.readable) == b"".join(other.readable)
        assert [memory.view(*target).tobytes() for target in one.targets] == [view.tobytes() for view in one.writable]
        assert _bytes(one) == _bytes(other)
    assert used_fast > 20


def _bytes(chain: Chain) -> list[int]:
    """The address of every writable byte, in order."""
    return [gpa + offset for gpa, length in chain.targets for offset in range(length)]
