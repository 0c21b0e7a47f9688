"""The console device (virtio 1.2, section 5.3), with multiport: port 0 is hvc0, the others are named byte
channels.

Each port is joined to one chardev. Output goes out as far as the chardev takes it, the rest stays in the
ring, which holds the guest back; input is read only when the guest has the port open and buffers waiting. A
driver without MULTIPORT gets port 0 alone.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from typing import Any, Literal

import msgspec

from qemu_user.backends.chardev.chardev import Chardev
from qemu_user.devices.device import require
from qemu_user.devices.virtio.device import VirtioDevice, VirtioState
from qemu_user.devices.virtio.queue import Queue, QueueError

F_SIZE, F_MULTIPORT, F_EMERG_WRITE = 1, 2, 4
DEVICE_READY, PORT_ADD, PORT_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = range(8)
CONTROL_RX, CONTROL_TX = 2, 3
MAX_PORTS = 16
PORT_QUEUE_SIZE, CONTROL_QUEUE_SIZE = 128, 64
INPUT_CHUNK = 4096
"""Bytes of input asked of the chardev at a time."""
MAX_CONTROL = 256
"""Control messages that wait for a driver which gives no buffers; more are dropped, and counted."""
_CONTROL = struct.Struct("<IHH")
_EMERGENCY = 8


class PortState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`sent`: bytes of the first output request that the chardev has already."""

    id: int
    guest_open: bool
    sent: int
    input: bytes


class ConsoleState(VirtioState, frozen=True, tag="console", kw_only=True):
    """`control`: messages that wait for the driver's buffers."""

    version: Literal[1] = 1
    rows: int
    columns: int
    control: list[bytes]
    ports: list[PortState]


class Port:
    """One port: a chardev's front end on a pair of queues."""

    def __init__(self, console: VirtioConsole, number: int, name: str, chardev: Chardev) -> None:
        self.id, self.name, self.chardev = number, name, chardev
        self._console = console
        self.clear()
        chardev.connect(self)

    def clear(self) -> None:
        """As after a reset."""
        self.guest_open = False
        self.sent = 0
        self.input = b""

    @property
    def rx(self) -> Queue:
        return self._console.queues[0 if self.id == 0 else 2 + 2 * self.id]

    @property
    def tx(self) -> Queue:
        return self._console.queues[1 if self.id == 0 else 3 + 2 * self.id]

    # -- output ------------------------------------------------------------------------------------

    def transmit(self, last: bool = False) -> None:
        """Serve the output queue. `last`: what it holds would be lost otherwise."""
        queue = self.tx
        if not queue.ready:
            return
        queue.suppress_kicks()
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                break
            data = chain.readable[0] if len(chain.readable) == 1 else b"".join(chain.readable)
            if self.sent:
                data = data[self.sent :]
            whole = self.chardev.room(last) >= len(data)
            if whole:
                # Linux's hvc waits in a loop for the buffer to come back: it gets it first.
                data = bytes(data)
                queue.push(chain, 0)
            taken = self.chardev.write(data, last or whole)
            if not whole and taken == len(data):
                queue.push(chain, 0)
            elif not whole:
                self.sent += taken
                queue.unpop(chain)
                self._console.transport.notify_used(queue)
                return
            self._console.counters.count("bytes_out", self.sent + taken)
            self.sent = 0
        if queue.has_requests:
            self._console.transport.serve_later(queue.index)
        self._console.transport.rest(queue)

    def output_ready(self) -> None:
        self._console.transport.run(self.transmit)

    def takes(self) -> int:
        """Bytes of output that need not be looked at."""
        return 0 if self.sent else self.chardev.room()

    def took(self, data: bytes) -> None:
        """So many of them, given back already."""
        self.chardev.write(data, last=True)
        self._console.counters.count("bytes_out", len(data))

    # -- input -------------------------------------------------------------------------------------

    @property
    def listening(self) -> bool:
        """Whether the guest would take input at all."""
        return self._console.live and (self.guest_open or not self._console.multiport)

    def input_room(self) -> int:
        with self._console.transport.lock:
            if self.input or not self.listening:
                return 0
            if not self.rx.has_requests and not self.rx.allow_kicks():
                return 0
            return INPUT_CHUNK

    def receive(self, data: bytes) -> None:
        with self._console.transport.lock:
            self.input += data
        self._console.transport.run(self.deliver)

    def deliver(self) -> None:
        """Hand waiting input to the guest, as far as it has buffers."""
        queue = self.rx
        while self.input and self.listening:
            chain = queue.pop()
            if chain is None:
                if queue.allow_kicks():
                    continue
                break
            taken = chain.fill(self.input)
            self.input = self.input[taken:]
            self._console.counters.count("bytes_in", taken)
            queue.push(chain, taken)
        self._console.transport.notify_used(queue)

    def opened(self) -> None:
        self._console.announce(self)

    def closed(self) -> None:
        self._console.announce(self)

    def resized(self, rows: int, columns: int) -> None:
        if self.id == 0:
            self._console.resize(rows, columns)


class VirtioConsole(VirtioDevice):
    """`ports`: (id, name, chardev); id 0 is the console and needs no name."""

    device_id = 3
    pci_class = 0x078000
    State = ConsoleState

    def __init__(self, name: str, ports: list[tuple[int, str, Chardev]]) -> None:
        count = max(number for number, _, _ in ports) + 1
        pair = [PORT_QUEUE_SIZE, PORT_QUEUE_SIZE]
        sizes = pair + [CONTROL_QUEUE_SIZE, CONTROL_QUEUE_SIZE] + pair * (count - 1)
        super().__init__(name, F_SIZE | F_MULTIPORT | F_EMERG_WRITE, sizes)
        self._count = count
        self._rows = self._columns = 0
        self._control: deque[bytes] = deque()
        self.ports = {number: Port(self, number, label, chardev) for number, label, chardev in ports}

    @property
    def multiport(self) -> bool:
        """Whether the driver knows of ports."""
        return bool(self.negotiated & F_MULTIPORT)

    def config(self) -> bytes:
        return struct.pack("<HHII", self._columns, self._rows, self._count, 0)

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == _EMERGENCY and 0 in self.ports:
            self.ports[0].chardev.write(data[:1])
        else:
            super().write_config(offset, data)

    def activate(self) -> None:
        if not self.multiport:
            for port in self.ports.values():
                port.chardev.resume_input()

    def _port(self, index: int) -> Port | None:
        return self.ports.get(0 if index < 2 else index // 2 - 1)

    def takes(self, index: int) -> int:
        port = self._port(index)
        return port.takes() if port is not None and index & 1 and index != CONTROL_TX else 0

    def took(self, index: int, data: bytes) -> None:
        port = self._port(index)
        assert port is not None
        port.took(data)

    def on_queue(self, index: int) -> None:
        if index == CONTROL_TX:
            self._read_control()
        elif index == CONTROL_RX:
            self._write_control()
        elif port := self._port(index):
            if index & 1:
                port.transmit()
            else:
                port.deliver()
                port.chardev.resume_input()

    # -- control messages --------------------------------------------------------------------------

    def _read_control(self) -> None:
        queue = self.queues[CONTROL_TX]
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                break
            if chain.readable_bytes < _CONTROL.size:
                raise QueueError("virtio-console: a control message too short")
            number, event, value = _CONTROL.unpack(chain.take(_CONTROL.size))
            queue.push(chain, 0)
            self._control_message(number, event, value)
        if queue.allow_kicks():
            self.transport.serve_later(CONTROL_TX)
        self.transport.notify_used(queue)

    def _control_message(self, number: int, event: int, value: int) -> None:
        if event == DEVICE_READY and value == 1:
            for port in self.ports.values():
                self._say(port.id, PORT_ADD, 1)
            return
        known = self.ports.get(number)
        if known is None:
            self.counters.count("bad_control")
        elif event == PORT_READY and value == 1:
            self._introduce(known)
        elif event == PORT_OPEN:
            known.guest_open = bool(value)
            if known.guest_open:
                known.deliver()
                known.chardev.resume_input()
        elif event not in (PORT_READY, DEVICE_READY):
            self.counters.count("bad_control")

    def _introduce(self, port: Port) -> None:
        if port.id == 0:
            self._say(0, CONSOLE_PORT, 1)
            self._say_size()
        if port.name:
            self._say(port.id, PORT_NAME, 1, port.name.encode() + b"\0")
        self._say(port.id, PORT_OPEN, int(port.chardev.is_open))

    def announce(self, port: Port) -> None:
        """The far end of a port came or went."""
        self.transport.run(lambda: self._say(port.id, PORT_OPEN, int(port.chardev.is_open)))

    def resize(self, rows: int, columns: int) -> None:
        """The terminal behind port 0 has this size now."""
        with self.transport.lock:
            if (rows, columns) == (self._rows, self._columns):
                return
            self._rows, self._columns = rows & 0xFFFF, columns & 0xFFFF
            if not self.multiport and self.negotiated & F_SIZE:
                self.transport.notify_config()
        self.transport.run(self._say_size)

    def _say_size(self) -> None:
        if self._rows and self._columns:
            # 5.3.6.2. Kernels before 6.12's stable updates of 2025 read them the other way round.
            self._say(0, RESIZE, 1, struct.pack("<HH", self._columns, self._rows))

    def _say(self, number: int, event: int, value: int, data: bytes = b"") -> None:
        if not self.multiport:
            return
        if len(self._control) >= MAX_CONTROL:
            self.counters.count("control_dropped")
            return
        self._control.append(_CONTROL.pack(number, event, value) + data)
        self._write_control()

    def _write_control(self) -> None:
        queue = self.queues[CONTROL_RX]
        while self._control:
            chain = queue.pop()
            if chain is None:
                if queue.allow_kicks():
                    continue
                break
            queue.push(chain, chain.fill(self._control.popleft()))
        self.transport.notify_used(queue)

    # -- life --------------------------------------------------------------------------------------

    def last_call(self) -> None:
        for port in self.ports.values():
            port.transmit(last=True)

    def finish(self, seconds: float) -> None:
        """At the machine's end, vCPUs and I/O thread being gone: what the guest has written reaches the
        host.
        """
        until = time.monotonic() + seconds
        for port in self.ports.values():
            while True:
                self.transport.run(port.transmit)
                port.chardev.drain(until - time.monotonic())
                if (
                    not (self.live and port.tx.has_requests and port.chardev.connected)
                    or time.monotonic() > until
                ):
                    break

    def changes_state(self, index: int) -> bool:
        return True

    def save(self) -> Any:
        return ConsoleState(
            rows=self._rows,
            columns=self._columns,
            control=list(self._control),
            ports=[
                PortState(id=port.id, guest_open=port.guest_open, sent=port.sent, input=port.input)
                for port in self.ports.values()
            ],
        )

    def check(self, state: Any) -> None:
        require(0 <= state.rows <= 0xFFFF and 0 <= state.columns <= 0xFFFF, f"{self.name}: size out of range")
        require(len(state.control) <= MAX_CONTROL, f"{self.name}: too many control messages")
        require(
            all(len(message) <= 512 for message in state.control), f"{self.name}: a control message too long"
        )
        require(
            [port.id for port in state.ports] == list(self.ports),
            f"{self.name}: saved with other ports than this one's",
        )
        for port in state.ports:
            require(0 <= port.sent < 1 << 32, f"{self.name}: port {port.id}: sent out of range")
            require(len(port.input) <= INPUT_CHUNK, f"{self.name}: port {port.id}: too much input")

    def restore(self, state: Any) -> None:
        self._rows, self._columns = state.rows, state.columns
        self._control = deque(state.control)
        for saved in state.ports:
            port = self.ports[saved.id]
            port.guest_open, port.sent, port.input = saved.guest_open, saved.sent, saved.input

    def reset(self) -> None:
        self._control.clear()
        for port in self.ports.values():
            port.clear()
