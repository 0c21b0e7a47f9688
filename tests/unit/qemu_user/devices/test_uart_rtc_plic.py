"""The UART, the clock, the finisher and the PLIC, register by register, as their drivers use them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_user.devices import ns16550a as uart
from qemu_user.devices import plic as p
from qemu_user.devices.goldfish_rtc import GoldfishRtc
from qemu_user.devices.ns16550a import Ns16550a
from qemu_user.devices.plic import Plic
from qemu_user.devices.syscon import Syscon
from tests.framework.devices import Bench, MemoryChardev
from tests.framework.virtio_driver import Line


class Serial:
    """A UART and its chardev, with byte-wide access by register."""

    def __init__(self) -> None:
        self.line, self.chardev = Line(), MemoryChardev()
        self.device = Ns16550a("uart", self.line, self.chardev)

    def get(self, register: int) -> int:
        return self.device.read(register, 1)

    def put(self, register: int, value: int) -> None:
        self.device.write(register, 1, value)


def test_transmit() -> None:
    serial = Serial()
    for value in b"hello":
        assert serial.get(uart.LSR) & uart.LSR_THRE
        serial.put(uart.THR, value)
    assert bytes(serial.chardev.taken) == b"hello"


def test_a_slow_terminal_holds_the_transmitter() -> None:
    serial = Serial()
    serial.put(uart.IER, uart.IER_THRI)
    assert serial.line.level
    assert serial.get(uart.IIR) & 0xF == uart.IIR_THRI
    assert not serial.line.level, "reading IIR clears the interrupt"
    serial.chardev.takes = 0
    serial.put(uart.THR, 0x41)
    assert not serial.get(uart.LSR) & uart.LSR_THRE
    assert not serial.line.level
    serial.chardev.takes = 10
    serial.device.output_ready()
    assert serial.get(uart.LSR) & uart.LSR_TEMT
    assert serial.line.level
    assert bytes(serial.chardev.taken) == b"A"


def test_thre_interrupt_comes_each_time_it_is_enabled() -> None:
    serial = Serial()  # Linux's serial8250_THRE_test
    for _ in range(2):
        serial.put(uart.IER, uart.IER_THRI)
        assert serial.get(uart.IIR) & 0xF == uart.IIR_THRI
        serial.put(uart.IER, 0)


def test_receive_fifo_trigger_and_timeout() -> None:
    serial = Serial()
    serial.put(uart.FCR, uart.FCR_ENABLE | 0x80)  # trigger at 8
    serial.put(uart.IER, uart.IER_RDI)
    assert serial.chardev.feed(b"abc") == 3
    assert serial.get(uart.IIR) & 0xF == uart.IIR_TIMEOUT
    assert serial.chardev.feed(b"0123456789abcdef") == 13, "16 in all"
    assert serial.get(uart.IIR) & 0xF == uart.IIR_RDI
    assert bytes(serial.get(uart.RBR) for _ in range(16)) == b"abc0123456789abc"
    assert serial.get(uart.IIR) & 0xF == uart.IIR_NONE
    assert not serial.line.level
    assert serial.chardev.resumed >= 16


def test_loopback_as_drivers_probe_it() -> None:
    serial = Serial()
    serial.put(uart.MCR, uart.MCR_LOOP | uart.MCR_RTS | uart.MCR_OUT2)
    assert serial.get(uart.MSR) & 0xF0 == uart.MSR_CTS | uart.MSR_DCD
    serial.put(uart.THR, 0x55)
    assert serial.get(uart.RBR) == 0x55
    assert not serial.chardev.taken


def test_divisor_latch_and_scratch() -> None:
    serial = Serial()
    serial.put(uart.LCR, uart.LCR_DLAB | 3)
    serial.put(uart.DLL, 0x34)
    serial.put(uart.DLM, 0x12)
    assert (serial.get(uart.DLL), serial.get(uart.DLM)) == (0x34, 0x12)
    serial.put(uart.LCR, 3)
    serial.put(uart.SCR, 0xA5)
    assert serial.get(uart.SCR) == 0xA5
    assert serial.get(uart.IER) == 0
    assert not serial.chardev.taken


# -- clock, finisher -------------------------------------------------------------------------------


def test_clock_reads_sets_and_alarms(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    clock = GoldfishRtc("rtc", bench.line, bench.timers, lambda: bench.now)

    def now() -> int:
        low = clock.read(0, 4)
        return clock.read(4, 4) << 32 | low

    assert now() == bench.now
    clock.write(0x10, 4, 1)
    alarm = bench.now + 1_000_000_000
    clock.write(0x0C, 4, alarm >> 32)
    clock.write(0x08, 4, alarm & 0xFFFFFFFF)
    assert clock.read(0x18, 4) == 1
    bench.now += 500_000_000
    bench.timers.fire()
    assert not bench.line.level
    bench.now = alarm
    bench.timers.fire()
    assert bench.line.level
    assert clock.read(0x18, 4) == 0
    clock.write(0x1C, 4, 1)
    assert not bench.line.level
    wanted = 1_000_000_000_000_000_000
    clock.write(4, 4, wanted >> 32)
    clock.write(0, 4, wanted & 0xFFFFFFFF)
    assert now() == wanted


@pytest.mark.parametrize(
    ("value", "asked"),
    [(0x5555, ("shutdown", 0)), (0x3333 | 3 << 16, ("shutdown", 3)), (0x7777, ("reset", 0))],
)
def test_finisher(value: int, asked: tuple[str, int]) -> None:
    found: list[tuple[str, int]] = []
    device = Syscon("test", lambda what, status: found.append((what, status)))
    device.write(0, 4, 0x1234)
    device.write(4, 4, value)
    assert found == []
    device.write(0, 4, value)
    assert found == [asked]


# -- PLIC ------------------------------------------------------------------------------------------


class Controller:
    def __init__(self) -> None:
        self.out = {0: False, 1: False}
        self.device = Plic("plic", 2, self.out.__setitem__, [1, 2])

    def enable(self, hart: int, source: int, priority: int = 1) -> None:
        """In the hart's S-mode context."""
        at = p.ENABLE + p.ENABLE_STRIDE * (2 * hart + 1) + 4 * (source // 32)
        self.device.write(at, 4, self.device.read(at, 4) | 1 << source % 32)
        self.device.write(4 * source, 4, priority)

    def claim(self, hart: int) -> int:
        return self.device.read(p.CONTEXT + p.CONTEXT_STRIDE * (2 * hart + 1) + p.CLAIM, 4)

    def complete(self, hart: int, source: int) -> None:
        self.device.write(p.CONTEXT + p.CONTEXT_STRIDE * (2 * hart + 1) + p.CLAIM, 4, source)


def test_claim_and_complete_of_a_level() -> None:
    plic = Controller()
    plic.enable(0, 10)
    line = plic.device.line(10)
    line.assert_line()
    assert plic.out == {0: True, 1: False}
    assert plic.claim(0) == 10
    assert not plic.out[0], "claimed: it does not interrupt again"
    assert plic.claim(0) == 0
    plic.complete(0, 10)
    assert plic.out[0], "the line is still up"
    assert plic.claim(0) == 10
    line.release_line()
    plic.complete(0, 10)
    assert not plic.out[0]


def test_priorities_and_threshold() -> None:
    plic = Controller()
    for source, priority in ((3, 1), (70, 7), (5, 7)):
        plic.enable(1, source, priority)
        plic.device.line(source).assert_line()
    assert [plic.claim(1) for _ in range(4)] == [5, 70, 3, 0]
    for source in (3, 5, 70):
        plic.complete(1, source)
    plic.device.write(p.CONTEXT + p.CONTEXT_STRIDE * 3, 4, 7)
    assert not plic.out[1]
    assert plic.claim(1) == 5, "claims disregard the threshold"
    assert plic.claim(0) == 0


def test_contexts_of_m_mode_drive_nothing() -> None:
    plic = Controller()
    plic.device.write(p.ENABLE, 4, 1 << 10)  # hart 0's M-mode
    plic.device.write(4 * 10, 4, 1)
    plic.device.line(10).assert_line()
    assert plic.out == {0: False, 1: False}
    assert plic.device.read(p.CONTEXT + p.CLAIM, 4) == 10, "its registers are there"


def test_completion_of_what_is_not_enabled_is_ignored() -> None:
    plic = Controller()
    plic.complete(0, 10)
    plic.complete(0, 0xFFFFFFFF)
    assert plic.device.counters["bad_completion"] == 2
