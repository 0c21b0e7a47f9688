"""The goldfish real-time clock: nanoseconds since 1970, and an alarm.

Registers as QEMU's hw/rtc/goldfish_rtc.c and Linux's drivers/rtc/rtc-goldfish.c have them: 32 bits each,
reading TIME_LOW latches TIME_HIGH, writing ALARM_LOW arms. Guests set the time by writing TIME_HIGH,
TIME_LOW; the host's clock is never touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from qemu_user.devices.device import Device, FdtNode, InterruptLine, Place, State, Timers, require

TIME_LOW, TIME_HIGH = 0x00, 0x04
ALARM_LOW, ALARM_HIGH = 0x08, 0x0C
IRQ_ENABLED = 0x10
CLEAR_ALARM = 0x14
ALARM_STATUS = 0x18
CLEAR_INTERRUPT = 0x1C

_U64 = (1 << 64) - 1
_LONGEST_TIMER = 3600.0
"""Seconds. The alarm looks at the clock again at least this often, so an absurd alarm is no absurd timer."""


class GoldfishRtcState(State, frozen=True, tag="goldfish_rtc", kw_only=True):
    """`offset` is guest time minus host time in ns, modulo 2^64; the rest are the registers' contents."""

    version: Literal[1] = 1
    offset: int
    time_high: int
    alarm: int
    alarm_running: bool
    irq_pending: bool
    irq_enabled: bool


class GoldfishRtc(Device):
    """One alarm, one interrupt (level: pending and enabled)."""

    compatible: ClassVar[str | list[str]] = "google,goldfish-rtc"
    region_size = 0x1000
    State = GoldfishRtcState

    def __init__(
        self, name: str, irq: InterruptLine, timers: Timers, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        super().__init__(name)
        self._irq, self._timers, self._clock_ns = irq, timers, clock_ns
        self._cancel: Callable[[], None] | None = None
        self._clear()

    def _clear(self) -> None:
        self._offset = self._time_high = self._alarm = 0
        self._alarm_running = self._irq_pending = self._irq_enabled = False

    def read(self, offset: int, size: int) -> int:
        if size != 4:
            return self.bad_access(offset, size)
        with self.lock:
            if offset == TIME_LOW:
                now = self._now()
                self._time_high = now >> 32
                return now & 0xFFFFFFFF
            if offset == TIME_HIGH:
                return self._time_high
            if offset == ALARM_LOW:
                return self._alarm & 0xFFFFFFFF
            if offset == ALARM_HIGH:
                return self._alarm >> 32
            if offset == IRQ_ENABLED:
                return int(self._irq_enabled)
            if offset == ALARM_STATUS:
                return int(self._alarm_running)
        return self.bad_access(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 4:
            self.bad_access(offset, size)
            return
        value &= 0xFFFFFFFF
        with self.lock:
            now = self._now()
            if offset == TIME_LOW:
                self._set_time(now & ~0xFFFFFFFF | value)
            elif offset == TIME_HIGH:
                self._set_time(now & 0xFFFFFFFF | value << 32)
            elif offset == ALARM_LOW:
                self._alarm = self._alarm & ~0xFFFFFFFF | value
                self._arm()
            elif offset == ALARM_HIGH:
                self._alarm = self._alarm & 0xFFFFFFFF | value << 32
            elif offset == IRQ_ENABLED:
                self._irq_enabled = bool(value & 1)
                self._update()
            elif offset == CLEAR_ALARM:
                self._alarm_running = False
                self._disarm()
            elif offset == CLEAR_INTERRUPT:
                self._irq_pending = False
                self._update()
            else:
                self.bad_access(offset, size)

    def _now(self) -> int:
        return (self._clock_ns() + self._offset) & _U64

    def _set_time(self, wanted: int) -> None:
        self._offset = (self._offset + wanted - self._now()) & _U64
        if self._alarm_running:
            self._arm()

    def _arm(self) -> None:
        self._disarm()
        wait = self._alarm - self._now()
        if wait <= 0:
            self._alarm_running, self._irq_pending = False, True
            self._update()
        else:
            self._alarm_running = True
            self._cancel = self._timers.call_later(min(wait / 1e9, _LONGEST_TIMER), self._timer)

    def _disarm(self) -> None:
        if self._cancel is not None:
            self._cancel()
            self._cancel = None

    def _timer(self) -> None:
        with self.lock:
            if self._alarm_running:
                self._arm()

    def _update(self) -> None:
        if self._irq_pending and self._irq_enabled:
            self._irq.assert_line()
        else:
            self._irq.release_line()

    def fdt_node(self, place: Place) -> FdtNode:
        return FdtNode(f"rtc@{place.base:x}", place.properties(self.compatible))

    def save(self) -> GoldfishRtcState:
        with self.lock:
            return GoldfishRtcState(
                offset=self._offset,
                time_high=self._time_high,
                alarm=self._alarm,
                alarm_running=self._alarm_running,
                irq_pending=self._irq_pending,
                irq_enabled=self._irq_enabled,
            )

    def restore(self, state: Any) -> None:
        require(0 <= state.offset <= _U64, "goldfish_rtc: offset out of range")
        require(0 <= state.time_high < 1 << 32, "goldfish_rtc: time_high out of range")
        require(0 <= state.alarm <= _U64, "goldfish_rtc: alarm out of range")
        with self.lock:
            self._disarm()
            self._offset, self._time_high, self._alarm = state.offset, state.time_high, state.alarm
            self._irq_pending, self._irq_enabled = state.irq_pending, state.irq_enabled
            self._alarm_running = state.alarm_running
            if self._alarm_running:
                wait = max(self._alarm - self._now(), 0)
                self._cancel = self._timers.call_later(min(wait / 1e9, _LONGEST_TIMER), self._timer)
            self._update()

    def reset(self) -> None:
        with self.lock:
            self._disarm()
            self._clear()
            self._update()
