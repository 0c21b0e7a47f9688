"""INTx: four level-triggered wires that the functions of a bus share (PCI Local Bus Specification 3.0, 2.2.6)."""

from __future__ import annotations

import threading

from qemu_user.devices.device import InterruptLine

PINS = 4


def swizzle(slot: int, pin: int) -> int:
    """The wire (0 to 3) of pin `pin` (1 = INTA) of the device in `slot`: QEMU's and the bridge specification's way."""
    return (slot + pin - 1) % PINS


class SharedWire:
    """One wire: asserted while anybody asserts it."""

    def __init__(self, line: InterruptLine) -> None:
        self._line = line
        self._asserted: set[object] = set()
        self._lock = threading.Lock()

    def tap(self) -> InterruptLine:
        """One more function on this wire."""
        return _Tap(self)

    def drive(self, who: object, level: bool) -> None:
        """`who` asserts or releases."""
        with self._lock:
            (self._asserted.add if level else self._asserted.discard)(who)
            if self._asserted:
                self._line.assert_line()
            else:
                self._line.release_line()


class _Tap:
    def __init__(self, wire: SharedWire) -> None:
        self._wire = wire

    def assert_line(self) -> None:
        self._wire.drive(self, True)

    def release_line(self) -> None:
        self._wire.drive(self, False)
