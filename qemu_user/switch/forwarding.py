"""The switch's core: frames of one port go to others, by VLAN and learned address (IEEE 802.1Q, clause 8).

Decisions are cached per port by the frame's first bytes and go stale when the address table or a port changes. Frames in a row
with one decision are handed on as one piece of memory, without a look at what is in them.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from protocol.codec.ethernet_stream import MAX_FRAME, StreamError
from qemu_user.devices.virtio.net_offload import SIZE as HEADER_SIZE
from qemu_user.devices.virtio.net_offload import BadHeader
from qemu_user.switch.mac_table import Entry, MacTable
from qemu_user.switch.port import LENGTH, Piece, Port
from qemu_user.switch.vlan import Class, classify, rewritten, sane

LONGEST = HEADER_SIZE + MAX_FRAME
SHORTEST = 14
_CACHED = 4096
"""Decisions that a port keeps."""


class Output(NamedTuple):
    """Where a frame goes. `same`: it leaves as it came; else with tag `tag`, or without any."""

    port: Port
    same: bool
    tag: int | None


class Decision(NamedTuple):
    """What is done with frames that begin alike. `vlan` None: refused."""

    version: int
    vlan: Class | None
    entry: Entry | None
    outputs: tuple[Output, ...]


class Forwarding:
    """The ports and the table. `transit`: other switches reach each other through us."""

    def __init__(self, table: MacTable, transit: bool = False) -> None:
        self.table, self.transit = table, transit
        self.ports: dict[int, Port] = {}
        self._numbers = 0
        self._touched: set[Port] = set()
        self.flooded = 0

    # -- ports -------------------------------------------------------------------------------------

    def add(self, port: Port) -> None:
        """A new port; it gets its number."""
        self._numbers += 1
        port.number = self._numbers
        port.forward, port.changed = self.forward, self._changed
        self.ports[port.number] = port
        self.table.version += 1

    def remove(self, port: Port) -> None:
        if self.ports.pop(port.number, None) is not None:
            self.table.forget_port(port.number)
        self._touched.discard(port)

    def _changed(self, port: Port) -> None:
        if port.is_up:
            self.table.version += 1
        else:
            self.table.forget_port(port.number)

    def configure(self, port: Port) -> None:
        """A port's settings have changed: what was learned there may be wrong."""
        self.table.forget_port(port.number)

    # -- frames ------------------------------------------------------------------------------------

    def forward(self, port: Port, view: memoryview, start: int, end: int) -> int:
        """Hand on the complete frames in view[start:end] (framed); where the rest begins. StreamError: no framing."""
        now = time.monotonic()
        ethernet = 4 + HEADER_SIZE if port.header else 4
        decisions, version = port.decisions, self.table.version
        current: Decision | None = None
        at = run = start
        frames = 0
        while end - at >= 4:
            (length,) = LENGTH.unpack_from(view, at)
            if not 0 < length <= LONGEST:
                raise StreamError(f"a frame of {length} bytes")
            after = at + 4 + length
            if after > end:
                break
            first = at + ethernet
            decision = decisions.get(bytes(view[first : first + SHORTEST]))
            if decision is None or decision.version != version:
                decision = self._decide(port, view[first:after], now)
                version = self.table.version
            if decision is not None and port.header and (view[at + 4] or view[at + 5]):
                decision = decision if sane(view[at + 4 : first], after - first) else None
            if decision is not current or decision is None:
                if current is not None:
                    self._emit(port, current, view, run, at, frames, now)
                current, run, frames = decision, at, 0
            if decision is None:
                port.rx_broken += 1
                run = after
            else:
                frames += 1
            at = after
        if current is not None and frames:
            self._emit(port, current, view, run, at, frames, now)
        touched, self._touched = self._touched, set()
        for target in touched:
            target.flush()
        return at

    def _decide(self, port: Port, frame: memoryview, now: float) -> Decision | None:
        """From the table; None: no Ethernet frame. Learns."""
        head = bytes(frame[:18])
        if len(head) < SHORTEST or head[6] & 1 or not any(head[6:12]):
            return None
        tagged = head[12:14] == b"\x81\x00"
        if tagged:
            if len(head) < 18:
                return None
            cached = port.decisions.get(head)
            if cached is not None and cached.version == self.table.version:
                return cached
        found = classify(head, port.settings)
        entry = None
        outputs: tuple[Output, ...] = ()
        if found is not None:
            entry = self.table.learn(found.vlan, head[6:12], port.number, now)
            outputs = self._outputs(port, found, head[:6])
        decision = Decision(self.table.version, found, entry, outputs)
        if len(port.decisions) >= _CACHED:
            port.decisions.clear()
        port.decisions[head if tagged else head[:14]] = decision
        return decision

    def _outputs(self, port: Port, found: Class, destination: bytes) -> tuple[Output, ...]:
        number = None if destination[0] & 1 else self.table.find(found.vlan, destination)
        candidates = [self.ports[number]] if number is not None else list(self.ports.values())
        outputs = []
        for other in candidates:
            settings = other.settings
            if other is port or not other.is_up or not settings.carries(found.vlan):
                continue
            if port.settings.isolated and settings.isolated:
                continue
            if port.is_link and other.is_link and not self.transit:
                continue
            tag = found.vlan | found.priority if settings.tags(found.vlan) else None
            same_tag = not found.tagged if tag is None else found.tagged and port.settings.tags(found.vlan)
            outputs.append(Output(other, same_tag and other.header == port.header, tag))
        return tuple(outputs)

    def _emit(
        self, port: Port, decision: Decision, view: memoryview, start: int, end: int, frames: int, now: float
    ) -> None:
        """Frames with one decision, framed in view[start:end], to their ports."""
        length = end - start
        port.rx_frames += frames
        port.rx_bytes += length - 4 * frames
        if decision.entry is not None:
            decision.entry.seen = now
        span = view[start:end]
        for capture in port.captures:
            capture.inbound(port, span)
        if decision.vlan is None:
            port.rx_refused += frames
            return
        if len(decision.outputs) > 1:
            self.flooded += frames
        other_forms: dict[tuple[int | None, bool], list[tuple[list[Piece], int]]] = {}
        for output in decision.outputs:
            target = output.port
            if output.same:
                forms: list[tuple[list[Piece], int]] = [([span], frames)]
            else:
                form = output.tag, target.header
                if form not in other_forms:
                    other_forms[form] = self._rewrite(port, decision.vlan.tagged, span, *form)
                forms = other_forms[form]
            for pieces, count in forms:
                target.put(pieces, sum(map(len, pieces)), count)
                for capture in target.captures:
                    capture.outbound(target, pieces)
            self._touched.add(target)

    def _rewrite(
        self, port: Port, tagged: bool, span: memoryview, tag: int | None, header: bool
    ) -> list[tuple[list[Piece], int]]:
        """The frames of a span in another form."""
        found: list[tuple[list[Piece], int]] = []
        at = 0
        while at < len(span):
            (length,) = LENGTH.unpack_from(span, at)
            frame = span[at + 4 : at + 4 + length]
            at += 4 + length
            try:
                if port.header:
                    parts = rewritten(frame[:HEADER_SIZE], frame[HEADER_SIZE:], tagged, tag, header)
                else:
                    parts = rewritten(None, frame, tagged, tag, header)
            except BadHeader:
                port.rx_broken += 1
                continue
            found += [(list[Piece](pieces), 1) for pieces in parts]
        return found
