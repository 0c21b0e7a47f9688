"""The control queue of the network device (virtio 1.2, 5.1.6.5): what is received, addresses, queues, offloads.

net.py hands each command's bytes to Control.command() and asks Control.wants() about every frame that comes in.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import msgspec

from qemu_user.devices.device import require

OK, ERR = 0, 1
RX, MAC, VLAN, ANNOUNCE, MQ, GUEST_OFFLOADS = range(6)
"""Command classes."""
RX_PROMISC, RX_ALLMULTI, RX_ALLUNI, RX_NOMULTI, RX_NOUNI, RX_NOBCAST = range(6)
MAC_TABLE_SET, MAC_ADDR_SET = 0, 1
VLAN_ADD, VLAN_DEL = 0, 1
ANNOUNCE_ACK = 0
MQ_VQ_PAIRS_SET = 0
GUEST_OFFLOADS_SET = 0
MAX_ADDRESSES = 64
"""Per table; a longer one means "all" (5.1.6.5.2: filtering is best effort)."""
_BROADCAST = b"\xff" * 6


class FilterState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`modes`: promisc, allmulti, alluni, nomulti, nouni, nobcast as bits."""

    modes: int
    unicast: list[bytes]
    multicast: list[bytes]
    vlans: bytes
    pairs: int
    offloads: int


class Control:
    """`max_pairs`: queue pairs that the device has; the callbacks carry out what reaches beyond filtering."""

    def __init__(
        self,
        max_pairs: int,
        set_mac: Callable[[bytes], None],
        set_offloads: Callable[[int], bool],
        announced: Callable[[], None],
    ) -> None:
        self._max_pairs = max_pairs
        self._set_mac, self._set_offloads, self._announced = set_mac, set_offloads, announced
        self.mac = bytes(6)
        self.reset()

    def reset(self) -> None:
        """As a driver without a control queue has it: everything is received, one pair is used."""
        self._modes = 1 << RX_PROMISC
        self._unicast: set[bytes] = set()
        self._multicast: set[bytes] = set()
        self._vlans = bytearray(512)
        self.filters_vlans = False
        self.pairs = 1
        self.offloads = 0

    # -- commands ----------------------------------------------------------------------------------

    def command(self, request: bytes) -> int:
        """OK or ERR of a command: class, number, data."""
        if len(request) < 2:
            return ERR
        kind, number, data = request[0], request[1], request[2:]
        handler = {
            RX: self._receive_mode,
            MAC: self._address,
            VLAN: self._vlan,
            ANNOUNCE: self._announce,
            MQ: self._set_pairs,
            GUEST_OFFLOADS: self._guest_offloads,
        }.get(kind)
        return OK if handler is not None and handler(number, data) else ERR

    def _receive_mode(self, number: int, data: bytes) -> bool:
        if number > RX_NOBCAST or len(data) != 1 or data[0] > 1:
            return False
        self._modes = self._modes & ~(1 << number) | data[0] << number
        return True

    def _address(self, number: int, data: bytes) -> bool:
        if number == MAC_ADDR_SET and len(data) == 6:
            self._set_mac(data)
            return True
        if number != MAC_TABLE_SET:
            return False
        tables = []
        for _ in range(2):
            if len(data) < 4:
                return False
            (count,) = struct.unpack_from("<I", data)
            table, data = data[4 : 4 + 6 * count], data[4 + 6 * count :]
            if len(table) != 6 * count:
                return False
            tables.append({table[at : at + 6] for at in range(0, len(table), 6)})
        if data:
            return False
        self._unicast, self._multicast = tables
        return True

    def _vlan(self, number: int, data: bytes) -> bool:
        if number > VLAN_DEL or len(data) != 2:
            return False
        (vid,) = struct.unpack("<H", data)
        if vid > 4095:
            return False
        bit = 1 << (vid & 7)
        self._vlans[vid >> 3] = self._vlans[vid >> 3] & ~bit | (bit if number == VLAN_ADD else 0)
        return True

    def _announce(self, number: int, data: bytes) -> bool:
        if number != ANNOUNCE_ACK or data:
            return False
        self._announced()
        return True

    def _set_pairs(self, number: int, data: bytes) -> bool:
        if number != MQ_VQ_PAIRS_SET or len(data) != 2:
            return False
        (pairs,) = struct.unpack("<H", data)
        if not 1 <= pairs <= self._max_pairs:
            return False
        self.pairs = pairs
        return True

    def _guest_offloads(self, number: int, data: bytes) -> bool:
        if number != GUEST_OFFLOADS_SET or len(data) != 8:
            return False
        return self._set_offloads(int.from_bytes(data, "little"))

    # -- filtering ---------------------------------------------------------------------------------

    def wants(self, frame: memoryview) -> bool:
        """Whether the driver asked for a frame like this."""
        modes = self._modes
        if self.filters_vlans and bytes(frame[12:14]) == b"\x81\0" and len(frame) >= 16:
            vid = (frame[14] & 15) << 8 | frame[15]
            if not self._vlans[vid >> 3] >> (vid & 7) & 1:
                return False
        if modes & 1 << RX_PROMISC:
            return True
        target = bytes(frame[:6])
        if target == _BROADCAST:
            return not modes & 1 << RX_NOBCAST
        if target[0] & 1:
            if modes & 1 << RX_NOMULTI:
                return False
            full = len(self._multicast) > MAX_ADDRESSES
            return bool(modes & 1 << RX_ALLMULTI) or full or target in self._multicast
        if modes & 1 << RX_NOUNI:
            return False
        full = len(self._unicast) > MAX_ADDRESSES
        return bool(modes & 1 << RX_ALLUNI) or full or target == self.mac or target in self._unicast

    # -- state -------------------------------------------------------------------------------------

    def save(self) -> FilterState:
        return FilterState(
            modes=self._modes,
            unicast=sorted(self._unicast),
            multicast=sorted(self._multicast),
            vlans=bytes(self._vlans),
            pairs=self.pairs,
            offloads=self.offloads,
        )

    def check(self, state: FilterState, name: str) -> None:
        """StateError unless restore() can take `state`."""
        require(0 <= state.modes < 1 << 6, f"{name}: receive modes out of range")
        require(all(len(mac) == 6 for mac in (*state.unicast, *state.multicast)), f"{name}: a bad address in a table")
        require(len(state.vlans) == 512, f"{name}: a VLAN table of another size")
        require(1 <= state.pairs <= self._max_pairs, f"{name}: more queue pairs than there are")
        require(0 <= state.offloads < 1 << 64, f"{name}: offloads out of range")

    def restore(self, state: FilterState) -> None:
        self._modes, self.pairs, self.offloads = state.modes, state.pairs, state.offloads
        self._unicast, self._multicast = set(state.unicast), set(state.multicast)
        self._vlans = bytearray(state.vlans)
