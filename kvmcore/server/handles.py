"""The table of a session: number -> handle or passed file, as a process's fd table is.

Called by kvmcore/server/session.py. Numbers of handles are random 31-bit values from 65536 up, so that a stale or an
invented number hits nothing, and never collide with the numbers of passed files, which are the client's own
descriptors. Must never say whether a number it refuses is closed, foreign or made up.
"""

from __future__ import annotations

import os
import struct
import threading
from errno import EBADF, EINVAL, EMFILE

from kvmcore.vm.objects import Handle, HostFile, VmChild, not_found
from protocol.abi.errors import KvmError
from protocol.codec import control

#: Client descriptors are below this number, handles are not.
FIRST_HANDLE = 1 << 16
_LAST_HANDLE = (1 << 31) - 1
_DRAWN = struct.Struct("64Q")
_MOST_RETIRED = 4096


class HandleTable:
    """Thread-safe: vCPU threads install and look up, the I/O thread closes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: dict[int, Handle | HostFile] = {}
        self._retired: set[int] = set()
        self._drawn: list[int] = []
        self._made: dict[int, int] | None = None
        """Of the batch that is being served: what it has made, by the number that stands for it (control.made)."""
        self._counts: dict[str, int] = {}
        """How many of each kind."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def install(self, handle: Handle) -> int:
        """The new number of `handle`. EMFILE when the table is full."""
        with self._lock:
            if len(self._entries) >= self._limit:
                raise KvmError(EMFILE, reason=f"a session has at most {self._limit} handles")
            while True:
                number = self._draw()
                if number not in self._entries and number not in self._retired:
                    break
            self._entries[number] = handle
        if self._made is not None:
            count = self._counts.get(handle.kind, 0)
            self._made[control.made(handle.kind, count)] = number
            self._counts[handle.kind] = count + 1
        handle.opened()
        return number

    def _draw(self) -> int:
        """A random number of a handle, from the kernel's generator, of which many are asked for at once."""
        if not self._drawn:
            self._drawn = list(_DRAWN.unpack(os.urandom(_DRAWN.size)))
        return FIRST_HANDLE + self._drawn.pop() % (_LAST_HANDLE - FIRST_HANDLE)

    def batch_begins(self) -> None:
        """From now on numbers may say "what this batch has made"."""
        self._made, self._counts = {}, {}

    def batch_ends(self) -> None:
        """No longer."""
        self._made = None

    def lookup(self, number: int) -> Handle | HostFile:
        """KvmError(EBADF) if there is nothing behind `number`."""
        entry = self._entries.get(number)
        if entry is None:
            raise not_found(number)
        return entry

    def handle(self, number: int) -> Handle:
        """As lookup(), for numbers that must be handles, or stand for one that the batch has made."""
        entry = self._entries.get(self.resolve(number) if number >> 31 else number)
        if isinstance(entry, Handle):
            return entry
        raise not_found(number)

    def resolve(self, number: int) -> int:
        """The number that control.made() stands for; any other one itself. EBADF."""
        if not number >> 31:
            return number
        real = self._made.get(number) if self._made is not None else None
        if real is None:
            raise not_found(number)
        return real

    def close(self, number: int) -> None:
        """close(2): EBADF if it is not open."""
        if 0 <= number < FIRST_HANDLE:
            self.close_file(number)
            return
        number = self.resolve(number)
        with self._lock:
            entry = self._entries.get(number)
            if not isinstance(entry, Handle):
                raise not_found(number)
            self._forget(number)
        entry.closed()

    def _forget(self, number: int) -> None:
        del self._entries[number]
        self._retired.add(number)
        if len(self._retired) > _MOST_RETIRED:
            self._retired.pop()

    def close_vm(self, number: int) -> int:
        """Close everything of the VM behind `number`, the VM itself last; how many handles. EBADF, EINVAL: no VM's number."""
        vm = self.handle(number)
        if vm.kind != "vm":
            raise KvmError(EINVAL, reason="not a VM")
        with self._lock:
            entries = self._entries.items()
            going: list[tuple[int, Handle]] = [(n, e) for n, e in entries if isinstance(e, VmChild) and e.vm is vm]
            going += [(n, vm) for n, entry in entries if entry is vm]
            for each, _ in going:
                self._forget(each)
        for _, handle in going:
            handle.closed()
        return len(going)

    def pass_file(self, number: int, fd: int) -> None:
        """Take `fd` (owned from now on) as the client's descriptor `number`, in place of an earlier one."""
        if not 0 <= number < FIRST_HANDLE:
            raise KvmError(EBADF, reason=f"descriptors are below {FIRST_HANDLE}")
        with self._lock:
            old = self._entries.get(number)
            if old is None and len(self._entries) >= self._limit:
                raise KvmError(EMFILE, reason=f"a session has at most {self._limit} handles")
            self._entries[number] = HostFile(fd)
        if isinstance(old, HostFile):
            old.close()

    def close_file(self, number: int) -> None:
        """Forget the passed file `number`. EBADF if there is none."""
        with self._lock:
            entry = self._entries.get(number)
            if not isinstance(entry, HostFile):
                raise not_found(number)
            del self._entries[number]
        entry.close()

    def close_files(self) -> None:
        """Forget every passed file; handles stay."""
        with self._lock:
            files = [(number, entry) for number, entry in self._entries.items() if isinstance(entry, HostFile)]
            for number, _ in files:
                del self._entries[number]
        for _, entry in files:
            entry.close()

    def close_all(self) -> None:
        """The session is over: close everything, VMs last, as exit(2) closes fds in order."""
        with self._lock:
            entries, self._entries = list(self._entries.values()), {}
        for entry in sorted(entries, key=lambda e: isinstance(e, Handle) and e.kind == "vm"):
            if isinstance(entry, HostFile):
                entry.close()
            else:
                entry.closed()
