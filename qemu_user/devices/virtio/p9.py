"""The 9P transport device (virtio 1.2, section 5.10 leaves its operation to 9P): a shared folder.

One queue of requests, each a message to read and room for the reply, served one after the other.
"""

from __future__ import annotations

from typing import Any, Literal

from qemu_user.backends.share.server import MAX_FIDS, MAX_MSIZE, MIN_MSIZE, FidState, Server
from qemu_user.devices.device import require
from qemu_user.devices.virtio.device import VirtioDevice, VirtioState
from qemu_user.devices.virtio.queue import QueueError

F_MOUNT_TAG = 1
QUEUE_SIZE = 128


class P9State(VirtioState, frozen=True, tag="9p", kw_only=True):
    """The session: what the client has agreed on, its fids."""

    version: Literal[1] = 1
    tag: str
    msize: int
    fids: list[FidState]


class VirtioP9(VirtioDevice):
    """`tag`: what the guest mounts it by."""

    device_id = 9
    pci_class = 0x000200
    own_thread = True
    State = P9State

    def __init__(self, name: str, tag: str, server: Server) -> None:
        super().__init__(name, F_MOUNT_TAG, [QUEUE_SIZE])
        self._tag, self._server = tag, server

    def config(self) -> bytes:
        raw = self._tag.encode()
        return len(raw).to_bytes(2, "little") + raw

    def on_queue(self, index: int) -> None:
        queue = self.queues[0]
        queue.suppress_kicks()
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                break
            length = chain.readable_bytes
            if length > MAX_MSIZE:
                raise QueueError("virtio-9p: a request of more than the largest msize")
            answer = self._server.serve(chain.take(length), chain.writable)
            if isinstance(answer, int):
                written = answer
            elif len(answer) > chain.writable_bytes:
                raise QueueError("virtio-9p: no room for the reply")
            else:
                written = chain.fill(answer)
            queue.push(chain, written)
            self.counters.count("requests")
        if queue.allow_kicks():
            self.transport.serve_later(0)
        self.transport.notify_used(queue)

    def changes_state(self, index: int) -> bool:
        return True

    def save(self) -> Any:
        return P9State(tag=self._tag, msize=self._server.msize, fids=self._server.save())

    def check(self, state: Any) -> None:
        require(state.tag == self._tag, f"{self.name}: saved with the tag {state.tag!r}")
        require(MIN_MSIZE <= state.msize <= MAX_MSIZE, f"{self.name}: msize out of range")
        require(len(state.fids) <= MAX_FIDS, f"{self.name}: too many fids")
        for fid in state.fids:
            require(0 <= fid.number < 1 << 32, f"{self.name}: a fid out of range")
            require(-1 <= fid.flags < 1 << 32, f"{self.name}: open flags out of range")
            good = all(0 < len(n) <= 255 and n not in (b".", b"..") and not {47, 0} & set(n) for n in fid.path)
            require(good, f"{self.name}: a fid with a bad path")

    def restore(self, state: Any) -> None:
        self._server.restore(state.msize, state.fids)

    def reset(self) -> None:
        self._server.reset()
