"""Futexes on shared words, and the doorbell by which a local client hands KVM_RUN to the vCPU's thread.

Called by protocol.client (rings, waits) and by kvmcore/vm/vcpu.py (answers what native code, kvmcore/engine/running.py,
has left to it). Waiting happens in the kernel with the GIL released; only native code spins. The words lie in memory that
the peer can write at will: whoever reads them reads once, and treats the value as a hint.
"""

from __future__ import annotations

import ctypes
import platform

_SYS_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98}[platform.machine()]
_FUTEX_WAIT = 0
_FUTEX_WAKE = 1
_EVERYBODY = 0x7FFFFFFF

_syscall = ctypes.CDLL(None).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_uint32,
)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def futex_wait(address: int, expected: int, timeout_ns: int | None) -> None:
    """Sleep while the u32 at `address` is `expected`, at most `timeout_ns`. Returns early now and then: look again."""
    if timeout_ns is None:
        _syscall(_SYS_FUTEX, address, _FUTEX_WAIT, expected, None, None, 0)
        return
    if timeout_ns <= 0:
        return
    limit = _Timespec(timeout_ns // 1_000_000_000, timeout_ns % 1_000_000_000)
    _syscall(_SYS_FUTEX, address, _FUTEX_WAIT, expected, ctypes.addressof(limit), None, 0)


def futex_wake(address: int) -> None:
    """Wake everybody who sleeps on the u32 at `address`."""
    _syscall(_SYS_FUTEX, address, _FUTEX_WAKE, _EVERYBODY, None, None, 0)


class Doorbell:
    """The eight words at the end of page 0 of a vCPU's mapping (offsets: protocol.abi.run_page)."""

    BELL, REQUEST, REPLY, RET, ERRNO, KICK, BELL_SLEEPS, REPLY_SLEEPS = range(8)
    #: How long each side sleeps before it looks whether the other one still lives.
    LOOK_NS = 1_000_000_000

    def __init__(self, page: memoryview, address: int, offset: int) -> None:
        """`page`: writable view of at least `offset` + 32 bytes that lies at `address` in this process."""
        self._words = page[offset : offset + 32].cast("I")
        self._bell = address + offset + 4 * self.BELL
        self._reply = address + offset + 4 * self.REPLY

    # -- the vCPU thread's side --------------------------------------------------------------------------------

    def requested(self) -> int:
        """The sequence number of the client's latest RUN."""
        return self._words[self.REQUEST]

    def ring(self) -> None:
        """Tell the vCPU thread that there is work: a RUN in the request word, or an ioctl in its private queue."""
        self._words[self.BELL] = (self._words[self.BELL] + 1) & 0xFFFFFFFF
        futex_wake(self._bell)

    def answer(self, sequence: int, ret: int, errno: int) -> None:
        """Publish the result of RUN number `sequence` and wake the client."""
        self._words[self.RET] = ret & 0xFFFFFFFF
        self._words[self.ERRNO] = errno
        self._words[self.REPLY] = sequence
        futex_wake(self._reply)

    # -- the client's side -------------------------------------------------------------------------------------

    def request(self) -> int:
        """Hand over a RUN; returns its sequence number."""
        sequence = (self._words[self.REQUEST] + 1) & 0xFFFFFFFF
        self._words[self.REQUEST] = sequence
        self.ring()
        return sequence

    def wait_reply(self, sequence: int) -> tuple[int, int] | None:
        """(ret, errno) of RUN `sequence`; None if it has not come within LOOK_NS."""
        seen = self._words[self.REPLY]
        if seen != sequence:
            self._words[self.REPLY_SLEEPS] = 1
            futex_wait(self._reply, seen, self.LOOK_NS)
            self._words[self.REPLY_SLEEPS] = 0
            if self._words[self.REPLY] != sequence:
                return None
        return self._words[self.RET], self._words[self.ERRNO]

    # -- kicks: sticky until a RUN returns EINTR -----------------------------------------------------------------

    def set_kick(self) -> None:
        self._words[self.KICK] = 1

    def kicked(self) -> bool:
        return self._words[self.KICK] != 0

    def take_kick(self) -> bool:
        """True if there was a kick; it is consumed."""
        if self._words[self.KICK] == 0:
            return False
        self._words[self.KICK] = 0
        return True
