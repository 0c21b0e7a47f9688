"""Where addresses were last heard: (VLAN, MAC) to port, forgotten after a while, bounded (IEEE 802.1Q, 8.7 and 8.8).

A full table loses the first entry of the port that has most: who floods the switch with addresses loses its own. Pure; the
caller brings the time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

LIMIT = 4096
AGEING_SECONDS = 300.0
"""IEEE 802.1Q, table 8-6."""


class Entry:
    """An address on a port. `seen`: when its last frame came (monotonic seconds)."""

    __slots__ = ("key", "port", "seen")

    def __init__(self, key: bytes, port: int, seen: float) -> None:
        self.key, self.port, self.seen = key, port, seen

    @property
    def vlan(self) -> int:
        return int.from_bytes(self.key[:2], "big")

    @property
    def mac(self) -> bytes:
        return self.key[2:]


class MacTable:
    """Ports are numbers. `version` goes up whenever an answer of find() may be another than before."""

    def __init__(self, limit: int = LIMIT, ageing: float = AGEING_SECONDS) -> None:
        self.limit, self.ageing = limit, ageing
        self.version = 0
        self.moves = self.evicted = 0
        self._entries: dict[bytes, Entry] = {}
        self._by_port: dict[int, OrderedDict[bytes, Entry]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def learn(self, vlan: int, mac: bytes, port: int, now: float) -> Entry:
        """A frame of `mac` came in on `port`; the entry that is kept fresh by it."""
        key = vlan.to_bytes(2, "big") + mac
        entry = self._entries.get(key)
        if entry is not None:
            entry.seen = now
            mine = self._by_port[entry.port]
            if entry.port == port:
                mine.move_to_end(key)
                return entry
            del mine[key]
            entry.port = port
            self.moves += 1
        else:
            if len(self._entries) >= self.limit:
                self._evict()
            entry = self._entries[key] = Entry(key, port, now)
        self._by_port.setdefault(port, OrderedDict())[key] = entry
        self.version += 1
        return entry

    def find(self, vlan: int, mac: bytes) -> int | None:
        """The port that an address was heard on."""
        entry = self._entries.get(vlan.to_bytes(2, "big") + mac)
        return entry.port if entry is not None else None

    def age(self, now: float) -> None:
        """Forget what was not heard for long."""
        old = [entry for entry in self._entries.values() if now - entry.seen > self.ageing]
        for entry in old:
            self._remove(entry)

    def forget_port(self, port: int) -> None:
        """Nobody is on this port any more."""
        for entry in tuple(self._by_port.pop(port, {}).values()):
            del self._entries[entry.key]
        self.version += 1

    def count(self, port: int) -> int:
        """Addresses on a port."""
        return len(self._by_port.get(port, ()))

    def _evict(self) -> None:
        most = max(self._by_port.values(), key=len)
        self._remove(next(iter(most.values())))
        self.evicted += 1

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.key]
        mine = self._by_port[entry.port]
        del mine[entry.key]
        if not mine:
            del self._by_port[entry.port]
        self.version += 1
