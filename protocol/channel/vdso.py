"""Machine code that kvmcore gives to local clients, as Linux gives a vDSO to its processes. Calls without the GIL: one does
RUN's hand-over, its bounded spin and its sleep; one spins until a word of shared memory changes; one serves a virtqueue of
small buffers.

Without it (another architecture, a host that lets nobody execute a memfd) doorbell.py does the first by system calls, and
nobody spins. The file is a sealed memfd: ticks of the host's counter in the longest spin, VERSION, then the functions, at
RUN_AT, WATCH_AT and DRAIN_AT.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

from protocol.channel.shared_memory import PROT_EXEC, PROT_READ, Mapping

RUN_AT, WATCH_AT, DRAIN_AT = 64, 2048, 2560
VERSION = 4
"""Of what the functions take and give: a client and a kvmcore of different versions do without them."""
SIZE = 4096
SPIN_US = 50
"""The longest spin."""
GAVE_UP = -4096
"""No answer within a second: the caller looks whether kvmcore lives, and goes on waiting."""
IN_VAIN, CHANGED, CROWDED, WANTED, GATHERED = range(5)
"""Of watch() and drain()."""
DRAIN = (
    "idle", "gap", "settle", "longest", "bell", "known", "available", "used", "table", "mask", "base", "size", "host", "buffer",
    "room", "next_available", "next_used", "signalled", "filled", "settled",
)  # fmt: skip
"""The words, u64 each, of drain()'s state. Ticks: without a request until it gives up; without us; after an answer until it
looks whether the driver wants an interrupt; that bytes may wait in the buffer. Addresses of a u16 that ends the call when it
is not `known`, of the rings and the descriptors of a queue of mask + 1; RAM: guest's address, bytes, ours; where requests go,
and how much is there. From next_available on they are changed: indices as in the queue, the used index that the driver was
told of last, and how many bytes have come."""
_FIRST_SCORE = (1 << 64) - 8
_HEAD = struct.Struct("<QQ")
#: Nobody changes what we are about to execute.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Vdso:
    """The mapped code. OSError: it cannot be had."""

    def __init__(self, fd: int) -> None:
        """Maps `fd`, which stays the caller's."""
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS or os.fstat(fd).st_size != SIZE:
            raise OSError("not a sealed page of code")
        self._mapping = Mapping([(fd, 0, SIZE)], PROT_READ | PROT_EXEC, private=True)
        self._most, version = _HEAD.unpack_from(self._mapping.view)
        self.ticks_per_us = self._most / SPIN_US
        if version != VERSION:
            raise OSError("code of another version")
        word = ctypes.c_uint64
        self.run = ctypes.CFUNCTYPE(ctypes.c_int64, word)(self._mapping.address + RUN_AT)
        """client_run(address of a state()): exit_reason, -errno, or GAVE_UP: then again, to go on waiting."""
        self.watch = ctypes.CFUNCTYPE(ctypes.c_int64, word)(self._mapping.address + WATCH_AT)
        """client_watch(address of {ticks, ticks without us, number of words, {address, value} of each}), all u64, the words
        u16: CHANGED, IN_VAIN or CROWDED."""
        self.drain = ctypes.CFUNCTYPE(ctypes.c_int64, word)(self._mapping.address + DRAIN_AT)
        """client_drain(address of {DRAIN}): IN_VAIN; CHANGED: the bell, or a request that it does not serve; CROWDED; WANTED:
        the driver wants an interrupt; GATHERED: there are bytes for so long now."""

    def state(self, bell: int) -> ctypes.Array[ctypes.c_uint64]:
        """What client_run knows of one vCPU, whose doorbell words are at address `bell`."""
        return (ctypes.c_uint64 * 7)(_FIRST_SCORE, self._most, self._most * (1_000_000 // SPIN_US), 1, 0, bell, 1)


def code_file(run: bytes, watch: bytes, drain: bytes, ticks: int) -> int:
    """The descriptor of such a file; `ticks` of the counter make SPIN_US. OSError."""
    page = _HEAD.pack(ticks, VERSION)
    for code, at, end in ((run, RUN_AT, WATCH_AT), (watch, WATCH_AT, DRAIN_AT), (drain, DRAIN_AT, SIZE)):
        page = page.ljust(at, b"\0") + code
        if len(page) > end:
            raise OSError("code that does not fit its page")
    fd = os.memfd_create("kvm-vdso", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, page.ljust(SIZE, b"\0"))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd
