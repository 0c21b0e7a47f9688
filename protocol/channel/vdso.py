"""The client's half of the doorbell as machine code that kvmcore gives to local clients, as Linux gives a vDSO to its
processes: one call without the GIL does RUN's hand-over, its bounded spin and its sleep.

Without it (another architecture, a host that lets nobody execute a memfd) doorbell.py does the same by system calls. The
file is a sealed memfd: ticks of the host's counter in the longest spin, VERSION, then, at CODE_AT, the function.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

from protocol.channel.shared_memory import PROT_EXEC, PROT_READ, Mapping

CODE_AT = 64
VERSION = 2
"""Of what the function takes and gives: a client and a kvmcore of different versions do without it."""
SIZE = 4096
SPIN_US = 50
"""The longest spin."""
GAVE_UP = -4096
"""No answer within a second: the caller looks whether kvmcore lives, and goes on waiting."""
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
        if version != VERSION:
            raise OSError("code of another version")
        word = ctypes.c_uint64
        self.run = ctypes.CFUNCTYPE(ctypes.c_int64, word)(self._mapping.address + CODE_AT)
        """client_run(address of a state()): exit_reason, -errno, or GAVE_UP: then again, to go on waiting."""

    def state(self, bell: int) -> ctypes.Array[ctypes.c_uint64]:
        """What client_run knows of one vCPU, whose doorbell words are at address `bell`."""
        return (ctypes.c_uint64 * 7)(_FIRST_SCORE, self._most, self._most * (1_000_000 // SPIN_US), 1, 0, bell, 1)


def code_file(code: bytes, ticks: int) -> int:
    """The descriptor of such a file; `ticks` of the counter make SPIN_US. OSError."""
    fd = os.memfd_create("kvm-vdso", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, (_HEAD.pack(ticks, VERSION).ljust(CODE_AT, b"\0") + code).ljust(SIZE, b"\0"))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd
