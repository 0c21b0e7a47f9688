"""Several disks as one, faster and larger (RAID-0): piece after piece of `chunk` bytes goes to one after the other. Without any
one of them all is lost."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress

from qemu_user.backends.block.raw import BlockBackend
from qemu_user.backends.block.views import Cutter
from qemu_user.backends.errors import BackendError

CHUNK = 64 << 10


class StripeDisk:
    """A BlockBackend over `members`, which take turns; as large as the smallest allows."""

    def __init__(self, members: list[BlockBackend], chunk: int = CHUNK) -> None:
        """BackendError if they are too small."""
        self.members, self.chunk = members, chunk
        self._chunks = min(member.size for member in members) // chunk
        self.size = self._chunks * chunk * len(members)
        if not self.size:
            raise BackendError(f"stripe: a member is smaller than a chunk of {chunk} bytes")
        self.readonly = any(member.readonly for member in members)
        self.discard = all(member.discard for member in members)

    @property
    def report(self) -> Callable[[str, str], None]:
        """The members'."""
        return self.members[0].report

    @report.setter
    def report(self, report: Callable[[str, str], None]) -> None:
        for member in self.members:
            member.report = report

    @property
    def descriptor(self) -> int | None:
        return None

    def _parts(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """(member, offset there, length) in the order of the disk's bytes."""
        parts = []
        while length:
            index, within = divmod(offset, self.chunk)
            part = min(length, self.chunk - within)
            row, member = divmod(index, len(self.members))
            parts.append((member, row * self.chunk + within, part))
            offset, length = offset + part, length - part
        return parts

    def _shares(self, offset: int, views: list[memoryview]) -> list[tuple[BlockBackend, int, list[memoryview]]]:
        """What each member has to do: what is consecutive for the disk and one member, is so there."""
        cutter = Cutter(views)
        starts: dict[int, int] = {}
        shares: dict[int, list[memoryview]] = {}
        for member, where, part in self._parts(offset, sum(map(len, views))):
            starts.setdefault(member, where)
            shares.setdefault(member, []).extend(cutter.next(part))
        return [(self.members[member], starts[member], share) for member, share in shares.items()]

    @property
    def waits(self) -> bool:
        return any(member.waits for member in self.members)

    def read_now(self, offset: int, views: list[memoryview]) -> bool | None:
        answers = [member.read_now(where, share) for member, where, share in self._shares(offset, views)]
        return False if False in answers else None if None in answers else True

    def read(self, offset: int, views: list[memoryview]) -> None:
        for member, where, share in self._shares(offset, views):
            member.read(where, share)

    def write(self, offset: int, views: list[memoryview]) -> None:
        for member, where, share in self._shares(offset, views):
            member.write(where, share)

    def _ranges(self, offset: int, length: int) -> list[tuple[BlockBackend, int, int]]:
        ranges: dict[int, tuple[int, int]] = {}
        for member, where, part in self._parts(offset, length):
            start, before = ranges.get(member, (where, 0))
            ranges[member] = start, before + part
        return [(self.members[member], start, part) for member, (start, part) in ranges.items()]

    def punch(self, offset: int, length: int) -> None:
        for member, where, part in self._ranges(offset, length):
            member.punch(where, part)

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        for member, where, part in self._ranges(offset, length):
            member.zero(where, part, unmap)

    def flush(self) -> None:
        for member in self.members:
            member.flush()

    def with_data(self, unit: int, chain: bool = True) -> bytearray:
        maps = [member.with_data(self.chunk) for member in self.members]
        marks = bytearray(-(-self.size // unit))
        for index in range(self._chunks * len(self.members)):
            if maps[index % len(self.members)][index // len(self.members)]:
                first, end = index * self.chunk // unit, ((index + 1) * self.chunk - 1) // unit + 1
                marks[first:end] = b"\1" * (end - first)
        return marks

    def lock(self) -> None:
        for member in self.members:
            member.lock()

    def unlock(self) -> None:
        for member in self.members:
            member.unlock()

    def hand_out(self) -> None:
        for member in self.members:
            member.hand_out()

    def locks(self) -> list[int]:
        return [fd for member in self.members for fd in member.locks()]

    def adopt_locks(self, take: Callable[[], int]) -> None:
        for member in self.members:
            member.adopt_locks(take)

    def resize(self, size: int) -> None:
        """Larger only: members that have less than their share get it. One that cannot leaves all as it was. OSError."""
        row = self.chunk * len(self.members)
        if size % row:
            raise OSError(errno.EINVAL, f"a striped disk grows by whole rows of {row} bytes")
        if size < self.size:
            raise OSError(errno.EOPNOTSUPP, "a striped disk does not shrink")
        share = size // len(self.members)
        changed: list[tuple[BlockBackend, int]] = []
        try:
            for member in self.members:
                before = member.size
                if before < share:
                    member.resize(share)
                    changed.append((member, before))
        except OSError:
            for member, before in changed:
                with suppress(OSError):
                    member.resize(before)
            raise
        self._chunks, self.size = share // self.chunk, size

    def close(self) -> None:
        """Close the members. Idempotent."""
        for member in self.members:
            member.close()
