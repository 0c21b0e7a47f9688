"""A guest that writes and flushes through virtio-blk until its process is killed. After each completed flush it prints how many
operations came before. The same seed gives the same operations, so whoever kills it knows what has to be on the disk:
`python -m tests.framework.disk_crash SEED FILE OPTIONS`.
"""

from __future__ import annotations

import json
import random
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple

SECTORS = 2048
"""Of the disk: 1 MiB."""
_MOST = 32


class Step(NamedTuple):
    """One operation on [sector, sector + count)."""

    kind: str
    sector: int
    count: int


def steps(seed: int) -> Iterator[Step]:
    """What the guest does, without end."""
    dice = random.Random(seed)
    while True:
        kind = dice.choices(["write", "zero", "discard", "flush"], [8, 1, 1, 3])[0]
        count = dice.choice([1, 8, 8, _MOST])
        yield Step(kind, dice.randrange(SECTORS - count), count)


def content(number: int, step: Step) -> bytes:
    """What operation `number` leaves in its sectors."""
    if step.kind != "write":
        return bytes(512 * step.count)
    return b"".join(struct.pack("<QQ", number, step.sector + index) * 32 for index in range(step.count))


def possible(seed: int, flushed: int, begun: int, before: bytes) -> list[set[bytes] | None]:
    """What each sector may hold when `flushed` operations were flushed and at most `begun` begun; None: anything."""
    sure: list[set[bytes] | None] = [{before[512 * index :][:512]} for index in range(SECTORS)]
    for number, step in zip(range(begun), steps(seed), strict=False):
        if step.kind == "flush":
            continue
        data = content(number, step)
        for index in range(step.count):
            sector = step.sector + index
            value = data[512 * index : 512 * (index + 1)]
            there = sure[sector]
            if step.kind == "discard":
                sure[sector] = None
            elif number < flushed or there is None:
                sure[sector] = {value} if number < flushed else None
            else:
                there.add(value)
    return sure


def verify(found: bytes, seed: int, flushed: int, begun: int, before: bytes) -> None:
    """AssertionError if something that was flushed is not there, or something is there that was never written."""
    for sector, allowed in enumerate(possible(seed, flushed, begun, before)):
        value = found[512 * sector : 512 * (sector + 1)]
        assert allowed is None or value in allowed, (
            f"seed {seed}, sector {sector}: holds {value[:16]!r}, {flushed} operations were flushed, {begun} begun"
        )


def main() -> None:
    """Run until killed."""
    from qemu_user.backends.block.logged import LoggedDisk
    from qemu_user.config.machine_config import Drive
    from qemu_user.devices.virtio import blk
    from qemu_user.devices.virtio.blk import VirtioBlk
    from qemu_user.devices.virtio.mmio import VirtioMmio
    from qemu_user.machine.drives import open_drive
    from tests.framework.virtio_driver import Driver, Line, make_memory

    seed, file, options = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    memory, _ = make_memory()
    device = VirtioBlk("disk", LoggedDisk(open_drive(Drive(file=file, discard=True, **options))))
    driver = Driver(VirtioMmio("disk", Line(), memory, device), memory).start()
    ring = driver.queues[0]
    kinds = {"write": blk.OUT, "flush": blk.FLUSH, "discard": blk.DISCARD, "zero": blk.WRITE_ZEROES}
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for number, step in enumerate(steps(seed)):
        header = struct.pack("<IIQ", kinds[step.kind], 0, step.sector if step.kind == "write" else 0)
        data = {"write": content(number, step), "flush": b""}.get(step.kind, struct.pack("<QII", step.sector, step.count, 0))
        _, where = ring.add([header, data] if data else [header], [1])
        ring.kick()
        assert len(ring.returned()) == 1
        assert driver.get(where[0], 1) == b"\0", step
        if step.kind == "flush":
            sys.stdout.write(f"{number}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
