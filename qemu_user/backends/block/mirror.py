"""Several disks with the same content (RAID-1): one that fails drops out, the guest notices nothing, and it is brought up to
date again when it is back.

Regions are marked on the disk (mirror_state.py) before they are written, and for as long as members may differ there: after a
kill or a power failure, and for a member that comes back, only they are copied. Who has dropped out is on the others' disks
before a write that it missed is done, so a stale member is never taken for a good one.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from qemu_user.backends.block.mirror_state import Record, StateFile, latest
from qemu_user.backends.block.raw import BlockBackend, unheard
from qemu_user.backends.block.views import is_zero
from qemu_user.backends.errors import BackendBusy, BackendError

GOOD, COPYING, OUT = "in sync", "being copied", "out"
_REGION = 1 << 20
_MOST_REGIONS = 1 << 16
_PIECE = 256 << 10
_SWEEP_SECONDS = 5.0


class Member:
    """One of the disks. `disk` is None for one that could not be opened; open_it(locked) opens it."""

    def __init__(self, name: str, open_it: Callable[[bool], BlockBackend], has_state: bool) -> None:
        self.name, self.open_it, self.has_state = name, open_it, has_state
        self.disk: BlockBackend | None = None
        self.state: StateFile | None = None
        self.role = OUT
        self.why = ""


def _fit(member: Member, size: int) -> None:
    """A member that was away when the mirror grew gets its size. BackendError."""
    assert member.disk is not None
    before = member.disk.size
    if before < size:
        try:
            member.disk.resize(size)
        except OSError as error:
            why = error.strerror or str(error)
            raise BackendError(f"mirror: {member.name} has {before} bytes, {size} are needed: {why}") from error


class MirrorDisk:
    """A BlockBackend over `members`, of which at least one has a state file."""

    def __init__(self, members: list[Member], readonly: bool = False, degraded: bool = False, locked: bool = True) -> None:
        """Without `degraded` all of them have to be there. BackendError."""
        self.members, self.readonly = members, readonly
        self._report: Callable[[str, str], None] = unheard
        self._unheard: list[tuple[str, str]] = []
        self._changed = threading.Condition()
        self._writing: Counter[int] = Counter()
        self._copied_now = -1
        self._thread: threading.Thread | None = None
        self._active = self._stopping = self._closed = False
        self._broken = False
        """Nobody could note who has dropped out: nothing is written any more."""
        self._swept = time.monotonic()
        self._touched: set[int] = set()
        try:
            self._open(degraded, locked)
            if locked:
                self._assemble()
        except BaseException:
            self._close_members()
            raise

    def _open(self, degraded: bool, locked: bool) -> None:
        if not any(member.has_state for member in self.members):
            raise BackendError("mirror: at least one member has to be a file, to keep beside it who has everything")
        for member in self.members:
            try:
                member.disk = member.open_it(locked)
            except BackendBusy:
                raise  # it is there, and another VM may be writing it
            except BackendError as error:
                if not degraded:
                    hint = "degraded=on starts without it, and what only it has is lost then"
                    raise BackendError(f"mirror: {error}; {hint}") from error
                member.why = str(error)
        disks = [member.disk for member in self.members if member.disk is not None]
        if not disks:
            raise BackendError(f"mirror: no member can be opened: {self.members[0].why}")
        self.size = self._smallest(disks)
        self.discard = all(disk.discard for disk in disks)
        self._region = _REGION
        while self.size // self._region > _MOST_REGIONS:
            self._region *= 2
        self._regions = -(-self.size // self._region)

    def _smallest(self, disks: list[BlockBackend]) -> int:
        """The size of the smallest member that has everything; who has missed a change of the size gets it with the rest."""
        records = {}
        for member in self.members:
            if member.has_state and os.path.exists(f"{member.name}.mirror"):
                state = StateFile(f"{member.name}.mirror", 0, readonly=True)
                records[member.name] = state.record
                state.close()
        best = latest(*records.values())
        whole = [
            member.disk
            for member in self.members
            if best is not None
            and member.disk is not None
            and best.members.get(member.name)
            and (not member.has_state or records.get(member.name) is not None)
        ]
        return min(disk.size for disk in whole or disks)

    # -- who has everything ------------------------------------------------------------------------

    def _assemble(self) -> None:
        """Find out which members have everything, and begin to bring the others there."""
        self._marks = bytearray(self._regions)
        present = [member for member in self.members if member.disk is not None]
        for member in present:
            if member.has_state and not (self.readonly and not os.path.exists(f"{member.name}.mirror")):
                member.state = StateFile(f"{member.name}.mirror", self._regions, self.readonly)
        records = [member.state.record for member in present if member.state is not None]
        if len({record.mirror for record in records if record is not None}) > 1:
            raise BackendError("mirror: its members belong to different mirrors (see their .mirror files)")
        best = latest(*records)
        if best is None:
            self._first_time(present)
        else:
            self._as_recorded(present, best)
        self._mirror = best.mirror if best else str(uuid.uuid4())
        self._generation = best.generation if best else 0
        good = [member for member in present if member.role == GOOD]
        if not good:
            there = ", ".join(member.name for member in present)
            raise BackendError(f"mirror: none of {there} has everything; the member that was written last is missing")
        if any(self._marks):  # they may differ there: one of them decides
            for member in good[1:]:
                member.role = COPYING
        self._active = True
        if not self.readonly:
            for member in present:
                _fit(member, self.size)
                if member.state is not None:
                    member.state.write_marks([region for region, mark in enumerate(self._marks) if mark], 1)
            self._write_records()
        for member in self.members:
            if member.disk is None:
                self._tell("BLOCK_MIRROR_DEGRADED", f"mirror: starts without {member.name}: {member.why}")
        self._start_copying()

    def _first_time(self, present: list[Member]) -> None:
        present[0].role = GOOD
        for member in present[1:]:
            self._demand_blank(member)
            member.role = OUT if self.readonly else COPYING
        if len(present) > 1:
            assert present[0].disk is not None
            self._marks[:] = present[0].disk.with_data(self._region)[: self._regions]

    def _demand_blank(self, member: Member) -> None:
        """What has content and is not known to be this mirror's is not overwritten. BackendError."""
        if self.readonly:
            return
        assert member.disk is not None
        view = memoryview(bytearray(_PIECE))
        for index, data in enumerate(member.disk.with_data(_PIECE)):
            if data:
                part = view[: min(_PIECE, member.disk.size - index * _PIECE)]
                member.disk.read(index * _PIECE, [part])
                if not is_zero([part]):
                    raise BackendError(
                        f"mirror: {member.name} has content that would be overwritten, and is not known to be this mirror's; "
                        "a new member has to be blank"
                    )

    def _as_recorded(self, present: list[Member], best: Record) -> None:
        for member in present:
            known = not member.has_state or (member.state is not None and member.state.record is not None)
            member.role = GOOD if known and best.members.get(member.name) else COPYING
            if not known or member.name not in best.members:
                self._demand_blank(member)
            if not known or member.name not in best.members or best.region != self._region:
                self._marks[:] = b"\1" * self._regions
        for member in present:
            if member.role == GOOD and member.state is not None:
                for region, mark in enumerate(member.state.marks):
                    self._marks[region] |= mark

    def _write_records(self) -> None:
        """Tell all good members' state files how things are. OSError if none of them could be written."""
        self._generation += 1
        record = Record(
            mirror=self._mirror, generation=self._generation, region=self._region,
            members={member.name: member.role == GOOD for member in self.members},
        )  # fmt: skip
        written = 0
        failure: OSError | None = None
        for member in self.members:
            if member.state is not None and member.role != OUT:
                try:
                    member.state.write(record)
                    written += 1
                except OSError as error:
                    failure = error
        if not written:
            self._broken = True
            raise failure or OSError(errno.EIO, "no member keeps the mirror's state")

    @property
    def report(self) -> Callable[[str, str], None]:
        """Where news goes; what happened before anybody listened is told at once."""
        return self._report

    @report.setter
    def report(self, report: Callable[[str, str], None]) -> None:
        self._report = report
        for member in self.members:
            if member.disk is not None:
                member.disk.report = report
        early, self._unheard = self._unheard, []
        for event, text in early:
            report(event, text)

    def _tell(self, event: str, text: str) -> None:
        if self._report is unheard:
            self._unheard.append((event, text))
        else:
            self._report(event, text)

    def _drop(self, member: Member, error: OSError) -> None:
        """A member has failed; the lock is held."""
        if member.role == OUT:
            return
        member.role, member.why = OUT, error.strerror or str(error)
        self._write_records()
        left = sum(other.role == GOOD for other in self.members)
        self._tell(
            "BLOCK_MIRROR_DEGRADED",
            f"mirror: {member.name} has failed ({member.why}) and is left out; {left} in sync. When it works again, QMP's "
            "x-mirror-resync brings it up to date, or the VM's next start does",
        )

    def _judge(self, failed: list[tuple[Member, OSError]]) -> None:
        """Members that failed drop out if one that has everything did not; else the guest gets the error."""
        if not failed:
            return
        with self._changed:
            bad = {member.name for member, _ in failed}
            if not any(member.role == GOOD and member.name not in bad for member in self.members):
                raise failed[0][1]
            for member, error in failed:
                self._drop(member, error)

    def status(self) -> list[tuple[str, str]]:
        """(member, GOOD, COPYING or OUT)."""
        with self._changed:
            return [(member.name, member.role) for member in self.members]

    # -- the disk ----------------------------------------------------------------------------------

    @property
    def descriptor(self) -> int | None:
        return None

    @property
    def waits(self) -> bool:
        return any(member.disk.waits for member in self.members if member.disk is not None)

    def _readers(self, offset: int) -> list[Member]:
        """Who is in sync, in the order in which they are asked for what is at `offset`."""
        with self._changed:
            self._demand_active()
            good = [member for member in self.members if member.role == GOOD]
        if not good:
            raise OSError(errno.EIO, "no member of the mirror is in sync")
        start = (offset // _REGION) % len(good)
        return good[start:] + good[:start]

    def read_now(self, offset: int, views: list[memoryview]) -> bool | None:
        disk = self._readers(offset)[0].disk
        try:
            return disk.read_now(offset, views) if disk is not None else False
        except OSError:
            return False  # read() finds out what that means

    def read(self, offset: int, views: list[memoryview]) -> None:
        failed: list[tuple[Member, OSError]] = []
        for member in self._readers(offset):
            assert member.disk is not None
            try:
                member.disk.read(offset, views)
                break
            except OSError as error:
                failed.append((member, error))
        self._judge(failed)

    def _demand_active(self) -> None:
        if not self._active:
            raise OSError(errno.EBUSY, "the mirror is another process's for now")
        if self._broken:
            raise OSError(errno.EIO, "the mirror cannot note who is in sync")

    def _change(self, offset: int, length: int, action: Callable[[BlockBackend], None]) -> None:
        """Do something to a range on all members."""
        if self.readonly:
            raise OSError(errno.EROFS, "the mirror is open for reading only")
        if not length:
            return
        regions = range(offset // self._region, (offset + length - 1) // self._region + 1)
        with self._changed:
            self._demand_active()
            while self._copied_now in regions:
                self._changed.wait()
            self._mark(regions)
            self._writing.update(regions)
            targets = [member for member in self.members if member.role != OUT]
        try:
            self._on_all(targets, action)
        finally:
            with self._changed:
                self._writing.subtract(regions)
                self._changed.notify_all()

    def _on_all(self, targets: list[Member], action: Callable[[BlockBackend], None]) -> None:
        failed = []
        for member in targets:
            assert member.disk is not None
            try:
                action(member.disk)
            except OSError as error:
                failed.append((member, error))
        self._judge(failed)

    def _mark(self, regions: range) -> None:
        self._touched.update(regions)
        fresh = [region for region in regions if not self._marks[region]]
        if fresh:
            failed = []
            for member in self.members:
                if member.state is not None and member.role != OUT:
                    try:
                        member.state.write_marks(fresh, 1)
                    except OSError as error:
                        failed.append((member, error))
            self._judge(failed)
            for region in fresh:
                self._marks[region] = 1

    def write(self, offset: int, views: list[memoryview]) -> None:
        self._change(offset, sum(map(len, views)), lambda disk: disk.write(offset, list(views)))

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        self._change(offset, length, lambda disk: disk.zero(offset, length, unmap))

    def punch(self, offset: int, length: int) -> None:
        if self.discard:  # as zeroes, so that all members read the same afterwards
            self.zero(offset, length, unmap=True)

    def flush(self) -> None:
        if self.readonly or not self._active:
            return
        with self._changed:
            before, self._touched = self._touched, set()
            targets = [member for member in self.members if member.role != OUT]
        try:
            self._on_all(targets, lambda disk: disk.flush())
        except OSError:
            self._touched |= before
            raise
        now = time.monotonic()
        if now - self._swept > _SWEEP_SECONDS:
            with self._changed:
                self._sweep(before | self._touched)
                self._swept = now

    def _sweep(self, keep: set[int]) -> None:
        """Members are alike where nothing was written since the last flush but one, if none is missing anything."""
        if any(member.role != GOOD for member in self.members):
            return
        same = [region for region, mark in enumerate(self._marks) if mark and region not in keep and not self._writing[region]]
        for member in self.members if same else ():
            if member.state is not None:
                with suppress(OSError):  # a mark too many costs a copy
                    member.state.write_marks(same, 0)
        for region in same:
            self._marks[region] = 0

    def with_data(self, unit: int, chain: bool = True) -> bytearray:
        good = next(member for member in self.members if member.role == GOOD)
        assert good.disk is not None
        return good.disk.with_data(unit, chain)[: -(-self.size // unit)]

    def resize(self, size: int) -> None:
        """All members that are there get the size, and who is out gets it when it is back. One that cannot grow leaves all as
        it was; one that cannot shrink stays larger. OSError.
        """
        if self.readonly:
            raise OSError(errno.EROFS, "the mirror is open for reading only")
        self._stop_copying()
        try:
            with self._changed:
                self._demand_active()
                while self._copied_now >= 0 or any(self._writing.values()):
                    self._changed.wait()
                disks = [member.disk for member in self.members if member.disk is not None and member.role != OUT]
                if size > self.size:
                    self._grow(disks, size)
                else:
                    self._shrink(disks, size)
                self._regions = -(-size // self._region)
                self._marks = self._marks[: self._regions].ljust(self._regions, b"\0")
                for member in self.members:
                    if member.state is not None:
                        member.state.resize(self._regions)
                self.size = size
        finally:
            self._start_copying()

    def _grow(self, disks: list[BlockBackend], size: int) -> None:
        changed: list[tuple[BlockBackend, int]] = []
        try:
            for disk in disks:
                if disk.size > self.size:  # what it has behind the mirror's end was never the guest's
                    disk.zero(self.size, min(disk.size, size) - self.size, True)
                if disk.size < size:
                    changed.append((disk, disk.size))
                    disk.resize(size)
                disk.flush()
        except OSError:
            for disk, before in changed:
                with suppress(OSError):
                    disk.resize(before)
            raise

    def _shrink(self, disks: list[BlockBackend], size: int) -> None:
        failure, done = None, False
        for disk in disks:
            try:
                disk.resize(size)
                disk.flush()
                done = True
            except OSError as error:
                failure = error
        if failure is not None and not done:
            raise failure

    # -- bringing members up to date ---------------------------------------------------------------

    def resync(self) -> list[str]:
        """Open members that are out anew and bring them up to date; their names. BackendError."""
        back = []
        with self._changed:
            self._demand_active()
            for member in self.members:
                if member.role == OUT:
                    self._take_back(member)
                    back.append(member.name)
        self._start_copying()
        return back

    def _take_back(self, member: Member) -> None:
        for old in (member.disk, member.state):
            if old is not None:
                old.close()
        member.disk = member.state = None
        member.disk = member.open_it(True)
        member.disk.report = self._report
        _fit(member, self.size)
        if member.has_state:
            member.state = StateFile(f"{member.name}.mirror", self._regions)
            if member.state.record is None or member.state.record.mirror != self._mirror:
                self._demand_blank(member)
                self._mark(range(self._regions))
            member.state.write_marks([region for region, mark in enumerate(self._marks) if mark], 1)
        member.role = COPYING

    def _start_copying(self) -> None:
        if self.readonly or not any(member.role == COPYING for member in self.members):
            return
        if self._thread is not None:
            self._thread.join()
        self._stopping = False
        self._thread = threading.Thread(target=self._copy_all, name="mirror", daemon=True)
        self._thread.start()

    def _copy_all(self) -> None:
        buffer = memoryview(bytearray(_PIECE))
        try:
            for region in range(self._regions):
                with self._changed:
                    if self._stopping:
                        return
                    if not self._marks[region]:
                        continue
                    while self._writing[region]:
                        self._changed.wait()
                    self._copied_now = region
                try:
                    self._copy_region(region, buffer)
                finally:
                    with self._changed:
                        self._copied_now = -1
                        self._changed.notify_all()
            self._copied()
        except OSError as error:
            self._tell("BLOCK_MIRROR_DEGRADED", f"mirror: members are not up to date: {error.strerror or error}")

    def _copy_region(self, region: int, buffer: memoryview) -> None:
        end = min((region + 1) * self._region, self.size)
        for offset in range(region * self._region, end, _PIECE):
            view = buffer[: min(_PIECE, end - offset)]
            self.read(offset, [view])
            with self._changed:
                targets = [member for member in self.members if member.role == COPYING]
            self._put(targets, offset, view)

    def _put(self, targets: list[Member], offset: int, view: memoryview) -> None:
        if is_zero([view]):
            self._on_all(targets, lambda disk: disk.zero(offset, len(view), True))
        else:
            self._on_all(targets, lambda disk: disk.write(offset, [view]))

    def _copied(self) -> None:
        with self._changed:
            targets = [member for member in self.members if member.role == COPYING]
        self._on_all(targets, lambda disk: disk.flush())
        with self._changed:
            done = [member for member in targets if member.role == COPYING]
            for member in done:
                member.role = GOOD
            if done:
                self._write_records()
                names = ", ".join(member.name for member in done)
                self._tell("BLOCK_MIRROR_SYNCED", f"mirror: {names}: up to date")

    def _stop_copying(self) -> None:
        with self._changed:
            self._stopping = True
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # -- life --------------------------------------------------------------------------------------

    def lock(self) -> None:
        for member in self.members:
            if member.disk is not None:
                member.disk.lock()
        if not self._active:
            self._assemble()

    def unlock(self) -> None:
        self._settle()
        for member in self.members:
            if member.disk is not None:
                member.disk.unlock()

    def _settle(self) -> None:
        self._stop_copying()
        if not self._active:
            return
        with suppress(OSError):
            self.flush()
            with self._changed:
                self._sweep(self._touched)
        self._active = False
        for member in self.members:
            if member.state is not None:
                member.state.close()
                member.state = None

    def hand_out(self) -> None:
        for member in self.members:
            if member.disk is not None and member.role != OUT:
                member.disk.hand_out()

    def locks(self) -> list[int]:
        return [fd for member in self.members if member.disk is not None for fd in member.disk.locks()]

    def adopt_locks(self, take: Callable[[], int]) -> None:
        for member in self.members:
            if member.disk is not None:
                member.disk.adopt_locks(take)

    def _close_members(self) -> None:
        for member in self.members:
            for part in (member.disk, member.state):
                if part is not None:
                    part.close()

    def close(self) -> None:
        """Flush, note that members are alike, close them. Idempotent."""
        if not self._closed:
            self._closed = True
            self._settle()
            self._close_members()
