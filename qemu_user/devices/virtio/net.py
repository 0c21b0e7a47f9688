"""The network device (virtio 1.2, section 5.1): one receive and one transmit queue, no offloads.

Frames go to a back end and come from one. With MRG_RXBUF a frame spreads over several receive buffers, which
is what lets a 64 KiB MTU through small ones. Neither side drops because the other is slow, except that a
frame which cannot fit the driver's buffers at all is counted and dropped.
"""

from __future__ import annotations

import struct
from typing import Any, Literal

from qemu_user.backends.net.backend import MAX_FRAME, NetBackend
from qemu_user.devices.device import require
from qemu_user.devices.virtio.device import VirtioDevice, VirtioState
from qemu_user.devices.virtio.queue import Chain, QueueError, split

F_MTU, F_MAC, F_MRG_RXBUF, F_STATUS = 1 << 3, 1 << 5, 1 << 15, 1 << 16
RX, TX = 0, 1
QUEUE_SIZE = 256
HEADER_SIZE = 12
LINK_UP = 1
_HEADER = struct.Struct("<BBHHHHH")


class NetState(VirtioState, frozen=True, tag="net", kw_only=True):
    """The address that the driver saw."""

    version: Literal[1] = 1
    mac: bytes


class VirtioNet(VirtioDevice):
    """`mac`: 6 bytes."""

    device_id = 1
    pci_class = 0x020000
    State = NetState

    def __init__(self, name: str, backend: NetBackend, mac: bytes) -> None:
        features = F_MAC | F_STATUS | F_MRG_RXBUF
        if backend.mtu != 1500:
            features |= F_MTU
        super().__init__(name, features, [QUEUE_SIZE, QUEUE_SIZE])
        self._backend, self._mac = backend, mac
        self._starved = False
        self._blocked = False
        backend.connect(self)

    def config(self) -> bytes:
        # mac, status, max_virtqueue_pairs, mtu (5.1.4); the rest belongs to features that are not offered
        return struct.pack("<6sHHH", self._mac, LINK_UP if self._backend.is_up else 0, 1, self._backend.mtu)

    def on_queue(self, index: int) -> None:
        if index == TX:
            self._transmit()
        elif self._starved:
            self._starved = False
            self._backend.resume()

    # -- driver to wire ----------------------------------------------------------------------------

    def _transmit(self) -> None:
        queue = self.queues[TX]
        if self._blocked or not queue.ready:
            return
        queue.suppress_kicks()
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                break
            if not self._send(chain):
                queue.unpop()
                self._blocked = True  # sent() goes on
                self.transport.notify_used(queue)
                return
        if queue.allow_kicks():
            self.transport.serve_later(TX)
        self.transport.notify_used(queue)

    def _send(self, chain: Chain) -> bool:
        if chain.readable_bytes < HEADER_SIZE:
            raise QueueError("virtio-net: a packet shorter than its header")
        _, frame = split(chain.readable, HEADER_SIZE)
        length = sum(map(len, frame))
        if not 14 <= length <= MAX_FRAME:
            self.counters.count("tx_dropped")
        elif not self._backend.send(frame):
            return False
        else:
            self.counters.count("tx_frames")
            self.counters.count("tx_bytes", length)
        self.queues[TX].push(chain, 0)
        return True

    def sent(self) -> None:
        self._blocked = False
        self.transport.run(self._transmit)

    def announce(self, frame: bytes) -> None:
        """Send a frame of the host's own making: who has moved tells the switches."""
        self._backend.send([memoryview(frame)])

    @property
    def mac(self) -> bytes:
        """The address that the driver sees."""
        return self._mac

    # -- wire to driver ----------------------------------------------------------------------------

    def receive(self, frame: memoryview) -> bool:
        with self.transport.lock:
            if not self.live:
                self.counters.count("rx_dropped")  # no driver: nobody listens on this wire
                return True
            try:
                return self._receive(frame)
            except QueueError as error:
                self.transport.broken(str(error))
                return True

    def _receive(self, frame: memoryview) -> bool:
        queue = self.queues[RX]
        merge = bool(self.negotiated & F_MRG_RXBUF)
        wanted = HEADER_SIZE + len(frame)
        chains: list[Chain] = []
        room = 0
        while room < wanted:
            chain = queue.pop()
            if chain is None:
                if queue.allow_kicks():
                    continue
                for _ in chains:
                    queue.unpop()
                self._starved = True
                return False
            if not chains and chain.writable_bytes < HEADER_SIZE:
                raise QueueError("virtio-net: a receive buffer shorter than a header")
            chains.append(chain)
            room += chain.writable_bytes
            if room < wanted and (not merge or len(chains) == queue.size):
                for _ in chains:
                    queue.unpop()
                self.counters.count("rx_too_long")
                return True
        queue.suppress_kicks()
        self._scatter(chains, frame)
        self.transport.notify_used(queue)
        return True

    def _scatter(self, chains: list[Chain], frame: memoryview) -> None:
        queue = self.queues[RX]
        done = 0
        for position, chain in enumerate(chains):
            written = 0
            if position == 0:
                # num_buffers is there with VERSION_1 always, and 1 without MRG_RXBUF (5.1.6.4.1)
                header = _HEADER.pack(0, 0, 0, 0, 0, 0, len(chains))
                chain.fill(header)
                chain.writable = split(chain.writable, HEADER_SIZE)[1]
                written = HEADER_SIZE
            filled = chain.fill(frame[done:])
            done += filled
            queue.push(chain, written + filled)
        self.counters.count("rx_frames")
        self.counters.count("rx_bytes", len(frame))

    def link(self, up: bool) -> None:
        transport = getattr(self, "transport", None)
        if transport is not None:
            with transport.lock:
                transport.notify_config()

    # -- state -------------------------------------------------------------------------------------

    def save(self) -> Any:
        return NetState(mac=self._mac)

    def check(self, state: Any) -> None:
        require(len(state.mac) == 6, f"{self.name}: a MAC address of {len(state.mac)} bytes")

    def restore(self, state: Any) -> None:
        self._mac = state.mac

    def reset(self) -> None:
        self._starved = False
        self.transport.defer(self._backend.resume)  # what it held back is not for the next driver
