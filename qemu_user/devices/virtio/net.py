"""The network device (virtio 1.2, section 5.1): queue pairs, control queue, checksum and segmentation offloads.

Frames go to a back end and come from one. Where the back end carries virtio-net headers they cross as they are; where
it does not, net_offload.py does in software what the driver left to us. With MRG_RXBUF a frame spreads over several
receive buffers. Neither side drops because the other is slow, except that a frame which cannot fit the driver's buffers
at all is counted and dropped.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

from qemu_user.backends.net.backend import MAX_FRAME, NetBackend
from qemu_user.devices.device import require
from qemu_user.devices.virtio import net_offload
from qemu_user.devices.virtio.device import F_VERSION_1, VirtioDevice, VirtioState
from qemu_user.devices.virtio.net_control import ERR, Control, FilterState
from qemu_user.devices.virtio.net_offload import DATA_VALID, GSO_NONE, NEEDS_CSUM, BadHeader, Header, plain_frames
from qemu_user.devices.virtio.queue import Chain, Queue, QueueError, split
from qemu_user.devices.virtio.rarp import rarp

F_CSUM, F_GUEST_CSUM, F_CTRL_GUEST_OFFLOADS, F_MTU, F_MAC = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5
F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_ECN, F_GUEST_UFO = 1 << 7, 1 << 8, 1 << 9, 1 << 10
F_HOST_TSO4, F_HOST_TSO6, F_HOST_ECN = 1 << 11, 1 << 12, 1 << 13
F_MRG_RXBUF, F_STATUS, F_CTRL_VQ, F_CTRL_RX, F_CTRL_VLAN = 1 << 15, 1 << 16, 1 << 17, 1 << 18, 1 << 19
F_CTRL_RX_EXTRA, F_GUEST_ANNOUNCE, F_MQ, F_CTRL_MAC_ADDR = 1 << 20, 1 << 21, 1 << 22, 1 << 23
CONTROL_FEATURES = F_CTRL_VQ | F_CTRL_RX | F_CTRL_VLAN | F_CTRL_RX_EXTRA | F_GUEST_ANNOUNCE | F_CTRL_MAC_ADDR
GUEST_OFFLOAD_BITS = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN
REQUIRES = {  # in an order in which one look suffices
    F_GUEST_TSO4: F_GUEST_CSUM,
    F_GUEST_TSO6: F_GUEST_CSUM,
    F_GUEST_ECN: F_GUEST_TSO4 | F_GUEST_TSO6,
    F_HOST_TSO4: F_CSUM,
    F_HOST_TSO6: F_CSUM,
    F_HOST_ECN: F_HOST_TSO4 | F_HOST_TSO6,
    F_CTRL_RX: F_CTRL_VQ,
    F_CTRL_RX_EXTRA: F_CTRL_RX,
    F_CTRL_VLAN: F_CTRL_VQ,
    F_GUEST_ANNOUNCE: F_CTRL_VQ,
    F_MQ: F_CTRL_VQ,
    F_CTRL_MAC_ADDR: F_CTRL_VQ,
    F_CTRL_GUEST_OFFLOADS: F_CTRL_VQ,
}
"""A feature and those of which it needs one (5.1.3.1)."""
BY_NAME = {
    "csum": F_CSUM,
    "guest_csum": F_GUEST_CSUM,
    "guest_tso4": F_GUEST_TSO4,
    "guest_tso6": F_GUEST_TSO6,
    "guest_ecn": F_GUEST_ECN,
    "host_tso4": F_HOST_TSO4,
    "host_tso6": F_HOST_TSO6,
    "host_ecn": F_HOST_ECN,
    "mrg_rxbuf": F_MRG_RXBUF,
    "ctrl_vq": F_CTRL_VQ,
    "ctrl_rx": F_CTRL_RX | F_CTRL_RX_EXTRA,
    "ctrl_vlan": F_CTRL_VLAN,
    "ctrl_mac_addr": F_CTRL_MAC_ADDR,
    "guest_announce": F_GUEST_ANNOUNCE,
    "mq": F_MQ,
}
"""What users may switch off, by QEMU's names (config/machine_config.py lists them too)."""
QUEUE_SIZE, CONTROL_QUEUE_SIZE = 256, 64
HEADER_SIZE = net_offload.SIZE
LINK_UP, ANNOUNCE = 1, 2
"""Status bits (5.1.4)."""
SMALL_MTU = 9000
"""Up to here cutting segments for the guest is cheaper than letting it send that many packets."""
MAX_CONTROL = 1 << 17
_MAX_FLOWS = 4096
_ANNOUNCE_SECONDS = 0.05
"""As QEMU's announce-initial: Linux's driver waits for the device with a whole CPU, and a guest that has just moved has more
urgent things to do; the switches know from announce() already."""


class NetState(VirtioState, frozen=True, tag="net", kw_only=True):
    """The address that the driver saw, whether the cable is plugged in, and what the control queue has set."""

    version: Literal[1] = 1
    mac: bytes
    plugged: bool
    announce: bool
    filter: FilterState


class VirtioNet(VirtioDevice):
    """`mac`: 6 bytes; `pairs`: queue pairs; `mtu`: what the driver is told, 0 for the back end's; `without`: names of
    features (BY_NAME) that are not offered, nor what builds on them.
    """

    device_id = 1
    pci_class = 0x020000
    own_thread = True
    required = F_VERSION_1  # without it the header would be shorter (5.1.6.1)
    State = NetState

    def __init__(
        self, name: str, backend: NetBackend, mac: bytes, pairs: int = 1, mtu: int = 0, without: Sequence[str] = ()
    ) -> None:
        features = F_MAC | F_STATUS | F_MRG_RXBUF | CONTROL_FEATURES
        self._mtu = mtu or backend.mtu
        if self._mtu != 1500:
            features |= F_MTU
        if backend.virtio_header or self._mtu <= SMALL_MTU:
            features |= F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN
        elif backend.trusted:
            features |= F_CSUM
        if backend.virtio_header:
            features |= GUEST_OFFLOAD_BITS | F_CTRL_GUEST_OFFLOADS
        elif backend.trusted:
            features |= F_GUEST_CSUM
        if pairs > 1:
            features |= F_MQ
        for left_out in without:
            features &= ~BY_NAME[left_out]
        for feature, needed in REQUIRES.items():
            if not features & needed:
                features &= ~feature
        super().__init__(name, features, [QUEUE_SIZE] * 2 * pairs + [CONTROL_QUEUE_SIZE])
        self._backend, self._mac, self._first_mac = backend, mac, mac
        self._max_pairs = pairs
        self._plugged = True
        self._announce = self._moved = False
        self._starved = self._blocked = False
        self._outgoing: deque[bytes | bytearray] = deque()
        """Segments of a packet that the back end has not taken yet."""
        self._incoming: deque[bytes | bytearray] = deque()
        """Segments of a packet that the driver had no buffers for."""
        self._flows: dict[bytes, int] = {}
        """Which pair a flow was last sent on (5.1.6.5.6: received packets go to the same)."""
        self._control = Control(pairs, self._set_mac, self._set_offloads, self._announced)
        self._control.mac = mac
        backend.connect(self)

    def config(self) -> bytes:
        # mac, status, max_virtqueue_pairs, mtu (5.1.4); the rest belongs to features that are not offered
        status = LINK_UP if self._backend.is_up and self._plugged else 0
        status |= ANNOUNCE if self._announce else 0
        return struct.pack("<6sHHH", self._mac, status, self._max_pairs, self._mtu)

    def features_good(self, wanted: int) -> bool:
        return all(not wanted & feature or wanted & needed for feature, needed in REQUIRES.items())

    def activate(self) -> None:
        self._control.filters_vlans = bool(self.negotiated & F_CTRL_VLAN)
        self._control.offloads = self.negotiated & GUEST_OFFLOAD_BITS
        self._backend.set_offloads(self._control.offloads)

    # -- queues ------------------------------------------------------------------------------------

    @property
    def _control_index(self) -> int:
        # 5.1.2: without MQ there is one pair, and the control queue comes next
        return 2 * self._max_pairs if self.negotiated & F_MQ else 2

    def on_queue(self, index: int) -> None:
        if index == self._control_index:
            self._serve_control()
        elif index > self._control_index:
            return  # a pair that was not negotiated
        elif index & 1:
            self._transmit(index)
        elif self._starved:
            self._starved = False
            self._resume_receiving()

    def _serve_control(self) -> None:
        queue = self.queues[self._control_index]
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                break
            if not chain.writable_bytes or chain.readable_bytes > MAX_CONTROL:
                raise QueueError("virtio-net: a control command without room for its answer, or too long")
            allowed = bool(self.negotiated & F_CTRL_VQ)
            answer = self._control.command(chain.take(chain.readable_bytes)) if allowed else ERR
            queue.push(chain, chain.fill(bytes((answer,))))
            self.counters.count("control_errors" if answer else "control_commands")
        if queue.allow_kicks():
            self.transport.serve_later(queue.index)
        self.transport.notify_used(queue)

    # -- what the control queue asks for -----------------------------------------------------------

    def _set_mac(self, mac: bytes) -> None:
        self._mac = self._control.mac = mac

    def _set_offloads(self, wanted: int) -> bool:
        if not self.negotiated & F_CTRL_GUEST_OFFLOADS or wanted & ~(self.negotiated & GUEST_OFFLOAD_BITS):
            return False
        self._control.offloads = wanted
        self._backend.set_offloads(wanted)
        return True

    def _announced(self) -> None:
        self._announce = False

    # -- driver to wire ----------------------------------------------------------------------------

    def _transmit(self, index: int) -> None:
        queue = self.queues[index]
        if self._blocked or not queue.ready:
            return
        queue.suppress_kicks()
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                break
            if not self._send(queue, chain):
                queue.unpop(chain)
                self._blocked = True  # sent() goes on
                self.transport.notify_used(queue)
                return
        if queue.allow_kicks():
            self.transport.serve_later(index)
        self.transport.notify_used(queue)

    def _send(self, queue: Queue, chain: Chain) -> bool:
        """Hand a packet to the back end; False: it cannot take it now."""
        if chain.readable_bytes < HEADER_SIZE:
            raise QueueError("virtio-net: a packet shorter than its header")
        raw, frame = split(chain.readable, HEADER_SIZE)
        header = Header(*net_offload.HEADER.unpack(b"".join(raw)))
        length = sum(map(len, frame))
        if not 14 <= length <= MAX_FRAME:
            self.counters.count("tx_dropped")
        elif not self._plugged:
            self.counters.count("tx_unplugged")
        elif self._backend.virtio_header:
            if not self._backend.send([memoryview(header.pack(0)), *frame]):
                return False
            self._count("tx", length)
        elif header.gso_type == GSO_NONE and (self._backend.trusted or not header.flags & NEEDS_CSUM):
            if not self._backend.send(frame):
                return False
            self._count("tx", length)
        elif not self._send_in_software(header, frame):
            return False
        if self._control.pairs > 1:
            self._learn(frame, queue.index // 2)
        queue.push(chain, 0)
        return True

    def _send_in_software(self, header: Header, frame: list[memoryview]) -> bool:
        if self._outgoing:
            return False
        try:
            self._outgoing.extend(plain_frames(header, bytearray().join(frame)))
        except BadHeader:
            self.counters.count("tx_dropped")
            return True
        self._drain_outgoing()
        return True

    def _drain_outgoing(self) -> bool:
        """Whether all segments are gone."""
        while self._outgoing:
            if not self._backend.send([memoryview(self._outgoing[0])]):
                self._blocked = True
                return False
            self._count("tx", len(self._outgoing.popleft()))
        return True

    def _count(self, way: str, length: int) -> None:
        self.counters.count(f"{way}_frames")
        self.counters.count(f"{way}_bytes", length)

    def sent(self) -> None:
        self._blocked = False
        self.transport.run(self._transmit_all)

    def _transmit_all(self) -> None:
        if not self._drain_outgoing():
            return
        for pair in range(self._control.pairs):
            self._transmit(2 * pair + 1)

    # -- steering ----------------------------------------------------------------------------------

    def _learn(self, frame: list[memoryview], pair: int) -> None:
        head = bytes(frame[0][:38]) if len(frame[0]) >= 38 else b"".join(frame)[:38]
        if head[12:14] == b"\x08\0":
            if len(self._flows) >= _MAX_FLOWS:
                self._flows.clear()
            # What comes back has addresses and ports the other way round.
            self._flows[head[30:34] + head[26:30] + head[36:38] + head[34:36]] = pair

    def _receive_queue(self, frame: memoryview) -> Queue:
        if self._control.pairs > 1 and bytes(frame[12:14]) == b"\x08\0":
            pair = self._flows.get(bytes(frame[26:38]), 0)
            if pair < self._control.pairs:
                return self.queues[2 * pair]
        return self.queues[0]

    # -- wire to driver ----------------------------------------------------------------------------

    def receive(self, frame: memoryview) -> bool:
        with self.transport.lock:
            if not self.live or not self._plugged:
                self.counters.count("rx_dropped")  # no driver: nobody listens on this wire
                return True
            try:
                return self._accept(frame)
            except QueueError as error:
                self.transport.broken(str(error))
                return True

    def _accept(self, frame: memoryview) -> bool:
        if not self._drain_incoming():
            return False
        header = Header(flags=DATA_VALID if self._backend.trusted and self._control.offloads & F_GUEST_CSUM else 0)
        if self._backend.virtio_header:
            if len(frame) < HEADER_SIZE:
                self.counters.count("rx_dropped")
                return True
            header, frame = Header(*net_offload.HEADER.unpack(frame[:HEADER_SIZE])), frame[HEADER_SIZE:]
        if len(frame) < 14 or not self._control.wants(frame):
            self.counters.count("rx_filtered")
            return True
        if self._understood(header):
            return self._deliver(header, frame)
        try:
            self._incoming.extend(plain_frames(header, bytearray(frame)))
        except BadHeader:
            self.counters.count("rx_dropped")
            return True
        self._drain_incoming()
        return True

    def _understood(self, header: Header) -> bool:
        """Whether the driver agreed to packets with such a header."""
        needed = F_GUEST_CSUM if header.flags & NEEDS_CSUM else 0
        if kind := header.gso_type & ~net_offload.GSO_ECN:
            needed |= {net_offload.GSO_TCPV4: F_GUEST_TSO4, net_offload.GSO_TCPV6: F_GUEST_TSO6}.get(kind, 1 << 63)
        if header.gso_type & net_offload.GSO_ECN:
            needed |= F_GUEST_ECN
        return not needed & ~self._control.offloads

    def _drain_incoming(self) -> bool:
        while self._incoming:
            if not self._deliver(Header(), memoryview(self._incoming[0])):
                return False
            self._incoming.popleft()
        return True

    def _resume_receiving(self) -> None:
        if self._drain_incoming():
            self._backend.resume()

    def _deliver(self, header: Header, frame: memoryview) -> bool:
        """Put one packet into receive buffers; False: there are not enough."""
        queue = self._receive_queue(frame)
        merge = bool(self.negotiated & F_MRG_RXBUF)
        wanted = HEADER_SIZE + len(frame)
        chains: list[Chain] = []
        room = 0
        while room < wanted:
            chain = queue.pop()
            if chain is None:
                if queue.allow_kicks():
                    continue
                for taken in reversed(chains):
                    queue.unpop(taken)
                self._starved = True
                return False
            if not chains and chain.writable_bytes < HEADER_SIZE:
                raise QueueError("virtio-net: a receive buffer shorter than a header")
            chains.append(chain)
            room += chain.writable_bytes
            if room < wanted and (not merge or len(chains) == queue.size):
                for taken in reversed(chains):
                    queue.unpop(taken)
                self.counters.count("rx_too_long")
                return True
        queue.suppress_kicks()
        self._scatter(queue, chains, header, frame)
        self.transport.notify_used(queue)
        return True

    def _scatter(self, queue: Queue, chains: list[Chain], header: Header, frame: memoryview) -> None:
        """The buffers of a packet become used together (5.1.6.4.1)."""
        done, answers = 0, []
        for position, chain in enumerate(chains):
            written = 0
            if position == 0:
                # num_buffers is there with VERSION_1 always, and 1 without MRG_RXBUF (5.1.6.4.1)
                chain.fill(header.pack(len(chains)))
                chain.writable = split(chain.writable, HEADER_SIZE)[1]
                written = HEADER_SIZE
            filled = chain.fill(frame[done:])
            done += filled
            answers.append((chain, written + filled))
        queue.push_all(answers)
        self._count("rx", len(frame))

    # -- link --------------------------------------------------------------------------------------

    def link(self, up: bool) -> None:
        transport = getattr(self, "transport", None)
        if transport is not None:
            with transport.lock:
                transport.notify_config()
                if up and self._plugged and self.negotiated:
                    # Who has come anew knows no addresses, and a guest that is idle may say nothing for hours.
                    self.announce()

    def plug(self, plugged: bool) -> None:
        """The user plugs the cable in or pulls it out (QMP's set_link). Any thread."""
        with self.transport.lock:
            if plugged != self._plugged:
                self._plugged = plugged
                self.transport.notify_config()

    def resumed(self) -> None:
        if self._moved:
            self.transport.later(_ANNOUNCE_SECONDS, self._have_announced)

    def _have_announced(self) -> None:
        if self._moved and self.negotiated & F_GUEST_ANNOUNCE:
            # 5.1.6.5.4: the guest tells the network where it is now, with all its addresses.
            self._announce = True
            self.transport.notify_config()
        self._moved = False

    def announce(self) -> None:
        """Tell the network where the guest's address is, whatever the guest does. On the device's I/O thread."""
        header = [memoryview(Header().pack(0))] if self._backend.virtio_header else []
        self._backend.send([*header, memoryview(rarp(self._mac))])

    def change_mac(self, mac: bytes) -> None:
        """A clone is another device on the wire; the driver is told that the configuration has changed."""
        with self.transport.lock:
            self._first_mac = mac
            self._set_mac(mac)
            self.transport.notify_config()

    @property
    def mac(self) -> bytes:
        """The address that the driver sees."""
        return self._mac

    # -- state -------------------------------------------------------------------------------------

    def changes_state(self, index: int) -> bool:
        return index == self._control_index

    def save(self) -> Any:
        return NetState(mac=self._mac, plugged=self._plugged, announce=self._announce, filter=self._control.save())

    def check(self, state: Any) -> None:
        require(len(state.mac) == 6, f"{self.name}: a MAC address of {len(state.mac)} bytes")
        self._control.check(state.filter, self.name)

    def restore(self, state: Any) -> None:
        self._set_mac(state.mac)
        self._plugged = state.plugged
        self._control.restore(state.filter)
        self._control.filters_vlans = bool(self.negotiated & F_CTRL_VLAN)
        self._announce, self._moved = state.announce, True
        self._backend.set_offloads(self._control.offloads)

    def queue_reset(self, index: int) -> None:
        if index == 0:
            self._incoming.clear()

    def reset(self) -> None:
        self._starved = self._announce = self._moved = False
        self._incoming.clear()
        self._flows.clear()
        self._control.reset()
        self._set_mac(self._first_mac)
        self.transport.defer(self._backend.resume)  # what it held back is not for the next driver
