"""What is a fault: judged per operation from the table, after each sequence, and every now and then.

The table says which errnos an ioctl may answer and what it returns; the log says whether something went wrong inside;
counts say whether something was left; and a bystander, a VM of our own that computes, must never notice anything.
"""

from __future__ import annotations

import time

from protocol.abi import run_page
from protocol.abi import structs_riscv as riscv
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_NAME, UNKNOWN_ERRNO
from protocol.client import Kvm
from qemu_user.fuzz.daemon import Daemon, Footprint
from qemu_user.fuzz.executor import Outcome
from qemu_user.fuzz.sequence import Finding, Op

_ALWAYS = {"EIO", "EBADF", "EMFILE", "EBADMSG"}
"""A dead VM, no such handle, the session's quota, more copies than a frame holds."""


def judge(op: Op, outcome: Outcome, step: int) -> Finding | None:
    """The ABI's table against one outcome."""
    if "internal error" in outcome.reason:
        return Finding("internal error", f"{op}: {outcome.reason}", step)
    row = BY_NAME.get(op.name)
    if op.do != "ioctl" or row is None:
        return None
    if outcome.errno:
        allowed = {*row.errnos, *_ALWAYS}
        if op.on[0] not in row.on:
            allowed |= {UNKNOWN_ERRNO.get(op.on[0], "ENOTTY"), "ENOTTY"}
        allowed |= {
            UNKNOWN_ERRNO[kind]
            for kind in row.on
            if not row.errnos or row.extension or (row.argument is not None and row.errnos == ("EFAULT",))
        }
        if outcome.errno not in allowed:
            return Finding("errno", f"{op}: {outcome.errno} is not among {' '.join(sorted(allowed))} ({outcome.reason})", step)
    elif row.returns == "zero" and outcome.ret != 0:
        return Finding("result", f"{op}: {outcome.ret} instead of 0", step)
    return None


class Bystander:
    """A VM that is never fuzzed: it runs a xorshift generator, and tells its state by an MMIO store every so often."""

    _ROUNDS = 1 << 16
    _PORT = 0x10000000
    #: loop: x ^= x << 13; x ^= x >> 7; x ^= x << 17; until a1 rounds are done; then store x to the port, again.
    _CODE = (
        0x00D51613,  # again: slli a2, a0, 13
        0x00C54533,  #        xor  a0, a0, a2
        0x00755613,  #        srli a2, a0, 7
        0x00C54533,  #        xor  a0, a0, a2
        0x01151613,  #        slli a2, a0, 17
        0x00C54533,  #        xor  a0, a0, a2
        0xFFF58593,  #        addi a1, a1, -1
        0xFE0592E3,  #        bnez a1, again   (-28)
        0x00068593,  #        mv   a1, a3
        0x00A73023,  #        sd   a0, 0(a4)
        0xFD9FF06F,  #        j    again       (-40)
    )

    def __init__(self, endpoint: str) -> None:
        self._kvm = Kvm.open(endpoint, name="bystander")
        self._vm = self._kvm.create_vm()
        memory = self._vm.create_guest_memfd(1 << 16)
        self._vm.set_user_memory_region2(0, 0x80000000, 1 << 16, flags=4, guest_memfd=memory)
        self._vm.write_gpa(0x80000000, b"".join(word.to_bytes(4, "little") for word in self._CODE))
        self._vcpu = self._vm.create_vcpu(0)
        self._state = 88172645463325252
        start = {"pc": 0x80000000, "a0": self._state, "a1": self._ROUNDS, "a3": self._ROUNDS, "a4": self._PORT}
        for name, value in start.items():
            self._vcpu.set_one_reg(riscv.CORE_ID[name], value)

    @property
    def pid(self) -> int:
        return self._vm.pid

    def check(self) -> Finding | None:
        """Have it compute on, and compare."""
        state = self._state
        for _ in range(self._ROUNDS):
            state ^= state << 13 & (1 << 64) - 1
            state ^= state >> 7
            state ^= state << 17 & (1 << 64) - 1
        self._state = state
        try:
            self._vcpu.run()
        except KvmError as error:
            return Finding("bystander", f"its RUN failed: {error}")
        told = int.from_bytes(self._vcpu.run_page[run_page.MMIO_DATA : run_page.MMIO_DATA + 8], "little")
        return None if told == state else Finding("bystander", f"computed {told:#x} instead of {state:#x}")

    def close(self) -> None:
        self._vm.close()
        self._kvm.close()


_KEPT_DESCRIPTORS = 16
"""The session's own, which sequences use again (place.py): some need more than those before. A leak goes beyond any number."""


class Leaks:
    """Compares the daemon's footprint with that of quiet moments before: what grows again and again is a leak.

    Once or twice is warming up: the translator takes descriptors when the bystander's loop gets hot. And what is gone at the
    next look was on its way out.
    """

    _AGAIN = 4

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._before = daemon.footprint()
        self._grown: list[str] = []
        self._suspicious = False

    def check(self) -> Finding | None:
        """Wait for what is on its way out, at most some seconds; then count."""
        more: list[str] = []
        for _ in range(40):
            now: Footprint = self._daemon.footprint()
            more = now.grown(self._before, _KEPT_DESCRIPTORS)
            if not more:
                self._suspicious = False
                return None
            time.sleep(0.1)
        if not self._suspicious:
            self._suspicious = True
            return None
        self._suspicious = False
        self._before = now
        self._grown.append(", ".join(more))
        return Finding("leak", "; ".join(self._grown)) if len(self._grown) >= self._AGAIN else None
