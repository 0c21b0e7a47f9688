"""The contract of a device: registers in, state out, and the wiring it is given.

Implemented by every file in this folder, driven by machine/bus.py (accesses), machine/machine.py (life) and
machine/fdt.py (the node). A device never imports machine, config, management or another device: its interrupt
line, guest memory, back end and timers are handed to it. What a guest does wrong is counted, never raised.

A worked example is syscon.py, the smallest device: a region, two registers, a State, one wire (`power`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import msgspec

PropertyValue = int | str | bytes | bool | list[int] | list[str]
"""A property of a device-tree node: int = one cell, list[int] = cells, str, list[str] = string list, bytes =
as they are, True = present and empty (False: absent).
"""


class FdtNode(NamedTuple):
    """A device-tree node as a device describes it; machine/fdt.py turns it into bytes."""

    name: str
    properties: dict[str, PropertyValue]
    children: list[FdtNode] = []


class Place(NamedTuple):
    """Where the machine put a device, as its tree node needs it."""

    base: int
    size: int
    interrupt: list[int]
    """Cells of the `interrupts` property, [] without one."""
    interrupt_parent: int
    """phandle of the interrupt controller."""
    phandle: int = 0
    """This device's own phandle if others refer to it, else 0."""

    def reg(self) -> list[int]:
        """The `reg` property under #address-cells = #size-cells = 2."""
        return [self.base >> 32, self.base & 0xFFFFFFFF, self.size >> 32, self.size & 0xFFFFFFFF]

    def properties(self, compatible: str | list[str]) -> dict[str, PropertyValue]:
        """compatible, reg, interrupts: what every node starts with."""
        found: dict[str, PropertyValue] = {"compatible": compatible, "reg": self.reg()}
        if self.interrupt:
            found["interrupts"] = self.interrupt
            found["interrupt-parent"] = self.interrupt_parent
        if self.phandle:
            found["phandle"] = self.phandle
        return found


class InterruptLine(Protocol):
    """A device's wire to the interrupt controller. Both calls are cheap to repeat and safe from any
    thread.
    """

    def assert_line(self) -> None:
        """There is a reason to interrupt (a level: raise it; an edge: one more pulse)."""

    def release_line(self) -> None:
        """There is none any more (a level: lower it; an edge: nothing)."""


class Doorbell(Protocol):
    """A guest-physical address at which stores are noticed without an exit (an ioeventfd)."""

    def place(self, address: int | None) -> None:
        """From now on at `address`, or nowhere (None)."""


MakeDoorbell = Callable[[Callable[[], None], int], Doorbell]
"""(called on the I/O thread after stores, bytes of a store that counts) -> a doorbell that is nowhere yet."""


class Timers(Protocol):
    """One-shot timers on the host's clocks."""

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` on the I/O thread in `seconds`; returns what cancels it."""


class StateError(ValueError):
    """A saved state that does not fit this device: wrong kind or version, or a value out of range."""


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="device", kw_only=True):
    """Base of every device's State. Subclasses set tag="<device>" and count `version` up when fields
    change.
    """

    version: int


S = TypeVar("S", bound=State)


def encode_state(state: State) -> bytes:
    """A device's state as msgpack."""
    return msgspec.msgpack.encode(state)


def decode_state(kind: type[S], data: bytes) -> S:
    """Hostile bytes into a state of `kind`; StateError says what is wrong where."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StateError(f"{kind.__name__}: {error}") from error


def require(condition: bool, what: str) -> None:
    """StateError unless `condition`: for restore()."""
    if not condition:
        raise StateError(what)


class Counters(dict[str, int]):
    """What happened to a device, by name; `counters.count("bad_access")`."""

    def count(self, name: str, by: int = 1) -> None:
        self[name] = self.get(name, 0) + by


class Device:
    """A thing with a memory-mapped region. read/write come from vCPU threads, back ends call from the I/O
    thread; the device keeps them apart with `lock`.
    """

    name: str
    compatible: ClassVar[str | list[str]]
    region_size: ClassVar[int]
    State: ClassVar[type[State]]

    def __init__(self, name: str) -> None:
        self.name = name
        self.counters = Counters()
        self.lock = threading.RLock()
        self.changed: Callable[[], None] = lambda: None
        """To be called when what save() gives has changed for another reason than an access; machine/keeper.py sets it."""

    def read(self, offset: int, size: int) -> int:
        """Value of a load of `size` (1, 2, 4, 8) bytes at `offset` < region_size."""
        raise NotImplementedError

    def write(self, offset: int, size: int, value: int) -> None:
        """A store of the low `size` bytes of `value`."""
        raise NotImplementedError

    def behind(self, offset: int, size: int) -> Device | None:
        """Whose state an access to `offset` may change: this device's, or that of one which is reached through it."""
        return self

    def fdt_node(self, place: Place) -> FdtNode:
        """The node that tells the guest about this device."""
        raise NotImplementedError

    def save(self) -> Any:
        """The device's State, without side effects."""
        raise NotImplementedError

    def restore(self, state: Any) -> None:
        """Become what `state` says; StateError (and unchanged) if it cannot be."""
        raise NotImplementedError

    def reset(self) -> None:
        """As after power-on; the wiring stays."""
        raise NotImplementedError

    def bad_access(self, offset: int, size: int) -> int:
        """A register that is not there, or not of that width: reads as zero, writes do nothing."""
        self.counters.count("bad_access")
        return 0
