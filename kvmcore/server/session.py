"""A client as one process of kvmcore sees it: who it is, its address space, its table of handles and files.

Sessions are the analogue of Linux processes (KVM_ABI section 8): opened by the acceptor, bound to the process that
connected (ipc) or to its CURVE key (tcp), and gone with it. Implements kvmcore.vm.objects.Session. Must never let
one session reach what another one holds.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from errno import EINVAL, EMFILE, EOPNOTSUPP

from kvmcore.server.handles import HandleTable
from kvmcore.server.quotas import Quotas
from kvmcore.vm.address_space import AddressSpace
from kvmcore.vm.objects import Handle, HostFile
from protocol.abi.compat import Compat
from protocol.abi.errors import KvmError
from protocol.channel.shared_memory import is_sealed
from protocol.codec.session import Message, Op


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
        self.mm = AddressSpace()
        self.table = HandleTable(quotas.handles)
        self.in_flight = 0
        self.dead = False
        self.last_seen = time.monotonic()
        self._segments_left = quotas.segments

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
            shared = self._perform(message, fds)
        except KvmError as error:
            return Message(message.op, message.seq, error.errno or EINVAL, body={"reason": error.reason}), []
        except OSError as error:
            return Message(message.op, message.seq, error.errno or EINVAL), []
        return Message(message.op, message.seq), shared

    def _perform(self, message: Message, fds: list[int]) -> list[int]:
        match message.op:
            case Op.MAP:
                self._map(message, fds)
            case Op.UNMAP:
                self.mm.unmap(message.a, message.b)
                self._segments_left += 1
            case Op.PASS_FILE:
                _exactly_one(fds)
                self.table.pass_file(message.a, fds[0])
                fds.clear()  # the table owns it now
            case Op.CLOSE_FILE:
                self.table.close_file(message.a)
            case Op.SHARE:
                return self.table.handle(message.a).shared_fds()
            case _:
                raise KvmError(EOPNOTSUPP, reason=f"unknown message {message.op}")
        return []

    def _map(self, message: Message, fds: list[int]) -> None:
        _exactly_one(fds)
        if not is_sealed(fds[0]):
            raise KvmError(EINVAL, reason="segments need a memfd sealed with F_SEAL_SHRINK|F_SEAL_GROW")
        if self._segments_left == 0:
            raise KvmError(EMFILE, reason="too many segments")
        self.mm.map(message.a, message.b, fds[0], message.c, message.d)
        self._segments_left -= 1

    def close(self) -> None:
        """The client is gone: everything it held goes. Idempotent."""
        if not self.dead:
            self.dead = True
            self.table.close_all()


def _exactly_one(fds: list[int]) -> None:
    if len(fds) != 1:
        raise KvmError(EINVAL, reason="this message carries exactly one descriptor")
