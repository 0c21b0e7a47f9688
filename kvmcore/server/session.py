"""A client as one process of kvmcore sees it: who it is, its address space, its table of handles and files.

Sessions are the analogue of Linux processes (KVM_ABI section 8): opened by the acceptor, bound to the process that
connected (ipc) or to its CURVE key (tcp), and gone with it. Implements kvmcore.vm.objects.Session. Must never let
one session reach what another one holds.
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from collections import deque
from dataclasses import dataclass
from errno import EINVAL, EMFILE, EOPNOTSUPP
from typing import TYPE_CHECKING

from kvmcore.server.handles import HandleTable
from kvmcore.server.quotas import Quotas
from kvmcore.vm.address_space import AddressSpace
from kvmcore.vm.objects import Handle, HostFile
from kvmcore.vm.vm import Vm
from protocol.abi.compat import Compat
from protocol.abi.errors import KvmError
from protocol.channel import fd_passing
from protocol.channel.shared_memory import create_memfd, is_sealed
from protocol.codec.session import Message, Op

if TYPE_CHECKING:
    import zmq

MAX_HOT = 16 << 20
MAX_KEPT = 64
"""Descriptors that a client may leave for its successor."""
MAX_WORD = 64


@dataclass(frozen=True)
class Peer:
    """Whom a session belongs to. ipc: the process, as the kernel vouches for it. tcp: the owner of a CURVE key."""

    pid: int = 0
    uid: int = 0
    key: str = ""

    def __str__(self) -> str:
        return f"key {self.key}" if self.key else f"process {self.pid}"


class ClientSession:
    """Made in the daemon by a hello; a VM process makes its twin, with the same id, for its one owner."""

    def __init__(
        self, session_id: bytes, peer: Peer, quotas: Quotas, *, name: str = "", compat: Compat = Compat.DEFAULT
    ) -> None:
        self.id = session_id
        self.peer = peer
        self.name = name
        self.compat = compat
        self.accel = ""
        """What its VMs run on (kvmcore/vm/accelerator.py); the daemon says."""
        self.together = False
        """Whether its VMs share a process (Kvm.open(together=True))."""
        self.mm = AddressSpace()
        self.table = HandleTable(quotas.handles)
        self.in_flight = 0
        self.dead = False
        self._outlives = False
        self._condition: tuple[int, tuple[bytes, ...]] | None = None
        """A file of the client's, and what it has to begin with for the VM to go on."""
        self._shared_hot = -1
        self._kept: dict[int, int] = {}
        """What the client has left for who attaches after it: key -> descriptor."""
        self.last_seen = time.monotonic()
        self._segments_left = quotas.segments
        self._highest_descriptor = quotas.highest_descriptor
        self.allowance = float(quotas.rate)
        """Requests that are served at once (router.py)."""
        self.waiting: deque[tuple[bytes, zmq.Frame]] = deque()
        """Messages that came too fast, with their sender's identity."""
        self.bytes_waiting = 0
        self.allowed_at = self.last_seen

    @staticmethod
    def new_id() -> bytes:
        """128 random bits: knowing them is what lets a message speak for the session."""
        return secrets.token_bytes(16)

    def seen(self) -> None:
        """The client has shown that it lives (tcp: its lease is renewed)."""
        self.last_seen = time.monotonic()

    @property
    def silent_for(self) -> float:
        """Seconds since seen()."""
        return time.monotonic() - self.last_seen

    # -- kvmcore.vm.objects.Session ---------------------------------------------------------------------------

    def install(self, handle: Handle) -> int:
        """Give `handle` a number. EMFILE when there are too many."""
        return self.table.install(handle)

    def lookup(self, number: int) -> Handle | HostFile:
        """What is behind `number`. EBADF."""
        return self.table.lookup(number)

    # -- messages of the session's socket ---------------------------------------------------------------------

    def serve(self, message: Message, fds: list[int]) -> tuple[Message, list[int]]:
        """Answer one message; (answer, descriptors to send with it, borrowed). Takes what it uses out of `fds`."""
        try:
            if fds and max(fds) > self._highest_descriptor:
                raise KvmError(EMFILE, reason="this process holds as many of its clients' descriptors as it may")
            shared = self._perform(message, fds)
        except KvmError as error:
            return Message(message.op, message.seq, error.errno or EINVAL, body={"reason": error.reason}), []
        except OSError as error:
            return Message(message.op, message.seq, error.errno or EINVAL), []
        return Message(message.op, message.seq), shared

    def _perform(self, message: Message, fds: list[int]) -> list[int]:
        match message.op:
            case Op.MAP:
                _exactly_one(fds)
                self.map(message.a, message.b, HostFile(fds[0]), message.c, message.d)
            case Op.UNMAP:
                self.unmap(message.a, message.b)
            case Op.PASS_FILE:
                _exactly_one(fds)
                self.table.pass_file(message.a, fds[0])
                fds.clear()  # the table owns it now
            case Op.CLOSE_FILE:
                self.table.close_file(message.a)
            case Op.SHARE:
                return self.table.handle(message.a).shared_fds()
            case Op.OUTLIVE:
                self._outlive(bool(message.a), message.body.get("while"), fds)
            case Op.KEEP:
                self._keep(message.a, fds)
            case Op.HOT:
                return self._hot(message, fds)
            case Op.KEPT:
                return [self._kept[message.a]] if message.a in self._kept else []
            case Op.VDSO:
                from kvmcore.vm.vdso import vdso_fd

                return [vdso_fd()]
            case _:
                raise KvmError(EOPNOTSUPP, reason=f"unknown message {message.op}")
        return []

    def map(self, va: int, size: int, file: HostFile, offset: int, prot: int) -> None:
        """mmap() of a sealed memfd, which stays the caller's. EINVAL, EEXIST, EMFILE."""
        if self._segments_left == 0:
            raise KvmError(EMFILE, reason="too many segments")
        self.mm.map(va, size, file, offset, prot)
        self._segments_left -= 1

    def unmap(self, va: int, size: int) -> None:
        """munmap(). EINVAL."""
        self.mm.unmap(va, size)
        self._segments_left += 1

    def _hot(self, message: Message, fds: list[int]) -> list[int]:
        vm = self.table.handle(message.a)
        if not isinstance(vm, Vm):
            raise KvmError(EINVAL, reason="hot code is a VM's")
        if message.b:
            vm.prepare_hot()
            return []
        if fds:
            _exactly_one(fds)
            if not is_sealed(fds[0]) or os.fstat(fds[0]).st_size > MAX_HOT:
                raise KvmError(EINVAL, reason=f"a sealed memfd of at most {MAX_HOT} bytes")
            vm.hot_elsewhere(os.pread(fds[0], MAX_HOT, 0))
            return []
        if self._shared_hot >= 0:
            os.close(self._shared_hot)
            self._shared_hot = -1
        hot = vm.hot_here()
        if not hot:
            return []
        self._shared_hot = create_memfd("hot-code", len(hot))
        os.pwrite(self._shared_hot, hot, 0)
        return [self._shared_hot]

    @property
    def outlives(self) -> bool:
        """Whether the VM goes on when the client dies, which perhaps it has."""
        if self._condition is None:
            return self._outlives
        fd, words = self._condition
        try:
            return os.pread(fd, MAX_WORD, 0).startswith(words)
        except OSError:
            return False

    def _outlive(self, on: bool, words: object, fds: list[int]) -> None:
        condition = None
        if fds:
            _exactly_one(fds)
            if not on or not stat.S_ISREG(os.fstat(fds[0]).st_mode):
                raise KvmError(EINVAL, reason="the condition of outliving is a regular file")
            if not isinstance(words, list) or not all(isinstance(word, str) and word.isascii() and word for word in words):
                raise KvmError(EINVAL, reason="the condition of outliving are words")
            condition = fds[0], tuple(word.encode() for word in words)
        self._forget_condition()
        self._outlives, self._condition = on, condition
        fds.clear()  # ours now

    def _forget_condition(self) -> None:
        if self._condition is not None:
            os.close(self._condition[0])
            self._condition = None

    def _keep(self, key: int, fds: list[int]) -> None:
        if len(fds) > 1:
            raise KvmError(EINVAL, reason="this message carries at most one descriptor")
        if fds and key not in self._kept and len(self._kept) >= MAX_KEPT:
            raise KvmError(EMFILE, reason=f"at most {MAX_KEPT} descriptors are kept")
        old = self._kept.pop(key, -1)
        if old >= 0:
            os.close(old)
        if fds:
            self._kept[key] = fds.pop()

    def pass_on(self, peer: Peer) -> None:
        """The client has died and `peer` takes its place: handles and segments stay, the descriptors that the dead one
        has passed go."""
        self.peer = peer
        self.table.close_files()

    def close(self) -> None:
        """The client is gone: everything it held goes. Idempotent."""
        if not self.dead:
            self.dead = True
            self.table.close_all()
            fd_passing.close_all(list(self._kept.values()))
            self._kept = {}
            self._forget_condition()


def _exactly_one(fds: list[int]) -> None:
    if len(fds) != 1:
        raise KvmError(EINVAL, reason="this message carries exactly one descriptor")
