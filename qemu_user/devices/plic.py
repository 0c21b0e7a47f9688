"""The platform-level interrupt controller, contexts as QEMU's virt has them: two a hart, M-mode's and S-mode's.

Registers after the RISC-V Platform-Level Interrupt Controller Specification 1.0.0, placed as SiFive's and
QEMU's virt. There is no M-mode: its contexts have registers and drive nothing. It lives here and not in
kvmcore: machine/irq.py wires its outputs to KVM_INTERRUPT. Sources are levels: pending follows the line until
it is claimed, and is looked at again on completion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from qemu_user.devices.device import Device, FdtNode, Place, State, require

SOURCES = 96
"""Source 0 does not exist."""
MAX_PRIORITY = 7
PRIORITY, PENDING = 0x0, 0x1000
ENABLE, ENABLE_STRIDE = 0x2000, 0x80
CONTEXT, CONTEXT_STRIDE = 0x200000, 0x1000
THRESHOLD, CLAIM = 0, 4
_WORDS = SOURCES // 32
_SUPERVISOR_EXTERNAL = 9

_NO_INTERRUPT = 0xFFFFFFFF
"""In interrupts-extended: a context that is wired to nothing."""

Output = Callable[[int, bool], None]
"""(hart, level): drives a hart's external interrupt."""


class PlicState(State, frozen=True, tag="plic", kw_only=True):
    """Bitmaps have bit i for source i; lists have one entry per source or context."""

    version: Literal[1] = 1
    priority: list[int]
    pending: list[int]
    claimed: list[int]
    level: list[int]
    """Three bitmaps of 96 bits, each as 32-bit words."""
    enable: list[list[int]]
    threshold: list[int]


def _words(bitmap: int) -> list[int]:
    return [bitmap >> 32 * i & 0xFFFFFFFF for i in range(_WORDS)]


def _bitmap(words: list[int], what: str) -> int:
    require(len(words) == _WORDS, f"plic: {what} has not {_WORDS} words")
    require(all(0 <= word < 1 << 32 for word in words), f"plic: {what} is not made of 32-bit words")
    bitmap = sum(word << 32 * i for i, word in enumerate(words))
    require(not bitmap & 1, f"plic: {what} has source 0")
    return bitmap


class PlicLine:
    """The wire of one source."""

    def __init__(self, plic: Plic, source: int) -> None:
        self._plic, self._source = plic, source

    def assert_line(self) -> None:
        self._plic.set_level(self._source, True)

    def release_line(self) -> None:
        self._plic.set_level(self._source, False)


class Plic(Device):
    """Of `harts` harts; `interrupt_controllers` are the phandles of their own controllers."""

    compatible: ClassVar[str | list[str]] = ["sifive,plic-1.0.0", "riscv,plic0"]
    region_size = 0x600000
    State = PlicState

    def __init__(self, name: str, harts: int, output: Output, interrupt_controllers: list[int]) -> None:
        super().__init__(name)
        self._contexts, self._output, self._controllers = 2 * harts, output, interrupt_controllers
        self._driven = [False] * harts
        self._level = 0
        self._clear()

    def _clear(self) -> None:
        self._priority = [0] * SOURCES
        self._pending = self._claimed = 0
        self._enable = [0] * self._contexts
        self._threshold = [0] * self._contexts

    def line(self, source: int) -> PlicLine:
        """The wire of `source`, 1 to 95."""
        return PlicLine(self, source)

    def set_level(self, source: int, level: bool) -> None:
        """A device's line changes. Any thread."""
        bit = 1 << source
        with self.lock:
            if bool(self._level & bit) == level:
                return
            self._level ^= bit
            if not self._claimed & bit:
                self._pending = self._pending | bit if level else self._pending & ~bit
                self._update()

    # -- registers ---------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if size != 4 or offset & 3:
            return self.bad_access(offset, size)
        with self.lock:
            if offset < PRIORITY + 4 * SOURCES:
                return self._priority[offset // 4]
            if PENDING <= offset < PENDING + 4 * _WORDS:
                return self._pending >> (offset - PENDING) * 8 & 0xFFFFFFFF
            if ENABLE <= offset < ENABLE + ENABLE_STRIDE * self._contexts:
                context, within = divmod(offset - ENABLE, ENABLE_STRIDE)
                return self._enable[context] >> within * 8 & 0xFFFFFFFF
            if CONTEXT <= offset < CONTEXT + CONTEXT_STRIDE * self._contexts:
                context, within = divmod(offset - CONTEXT, CONTEXT_STRIDE)
                if within == THRESHOLD:
                    return self._threshold[context]
                if within == CLAIM:
                    return self._claim(context)
        return self.bad_access(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 4 or offset & 3:
            self.bad_access(offset, size)
            return
        value &= 0xFFFFFFFF
        with self.lock:
            if 4 <= offset < PRIORITY + 4 * SOURCES:
                self._priority[offset // 4] = value & MAX_PRIORITY
            elif ENABLE <= offset < ENABLE + ENABLE_STRIDE * self._contexts:
                context, within = divmod(offset - ENABLE, ENABLE_STRIDE)
                if within < 4 * _WORDS:
                    mask = 0xFFFFFFFF << within * 8
                    self._enable[context] = (self._enable[context] & ~mask | value << within * 8) & ~1
            elif CONTEXT <= offset < CONTEXT + CONTEXT_STRIDE * self._contexts:
                context, within = divmod(offset - CONTEXT, CONTEXT_STRIDE)
                if within == THRESHOLD:
                    self._threshold[context] = value & MAX_PRIORITY
                elif within == CLAIM:
                    self._complete(context, value)
                else:
                    self.bad_access(offset, size)
            elif not (offset == 0 or PENDING <= offset < PENDING + 4 * _WORDS):  # those two are read-only
                self.bad_access(offset, size)
            self._update()

    def _best(self, context: int) -> int:
        """The source that a claim would give now, 0 for none: highest priority, then lowest number."""
        waiting = self._pending & self._enable[context]
        best, best_priority = 0, self._threshold[context]
        while waiting:
            source = (waiting & -waiting).bit_length() - 1
            waiting &= waiting - 1
            if self._priority[source] > best_priority:
                best, best_priority = source, self._priority[source]
        return best

    def _claim(self, context: int) -> int:
        # A claim disregards the threshold (specification, chapter 8).
        threshold, self._threshold[context] = self._threshold[context], 0
        source = self._best(context)
        self._threshold[context] = threshold
        if source:
            self._pending &= ~(1 << source)
            self._claimed |= 1 << source
            self._update()
        return source

    def _complete(self, context: int, source: int) -> None:
        bit = 1 << source if source < SOURCES else 0
        if not bit & self._enable[context]:  # silently ignored (specification, chapter 9)
            self.counters.count("bad_completion")
            return
        self._claimed &= ~bit
        if self._level & bit:
            self._pending |= bit

    def _update(self) -> None:
        for hart, driven in enumerate(self._driven):
            wanted = self._best(2 * hart + 1) != 0
            if wanted != driven:
                self._driven[hart] = wanted
                self._output(hart, wanted)

    # -- tree and state ----------------------------------------------------------------------------

    def fdt_node(self, place: Place) -> FdtNode:
        extended: list[int] = []
        for phandle in self._controllers:
            extended += [phandle, _NO_INTERRUPT, phandle, _SUPERVISOR_EXTERNAL]
        return FdtNode(
            f"plic@{place.base:x}",
            {
                **place.properties(self.compatible),
                "interrupt-controller": True,
                "#interrupt-cells": 1,
                "#address-cells": 0,
                "interrupts-extended": extended,
                "riscv,ndev": SOURCES - 1,
            },
        )

    def save(self) -> PlicState:
        with self.lock:
            return PlicState(
                priority=list(self._priority),
                pending=_words(self._pending),
                claimed=_words(self._claimed),
                level=_words(self._level),
                enable=[_words(bitmap) for bitmap in self._enable],
                threshold=list(self._threshold),
            )

    def restore(self, state: Any) -> None:
        require(len(state.priority) == SOURCES, f"plic: priorities of {len(state.priority)} sources")
        require(
            all(0 <= p <= MAX_PRIORITY for p in (*state.priority, *state.threshold))
            and state.priority[0] == 0,
            "plic: a priority is out of range",
        )
        require(
            len(state.enable) == len(state.threshold) == self._contexts,
            f"plic: saved with {len(state.enable)} contexts, this machine has {self._contexts}",
        )
        pending, claimed = _bitmap(state.pending, "pending"), _bitmap(state.claimed, "claimed")
        level = _bitmap(state.level, "level")
        enable = [_bitmap(words, "enable") for words in state.enable]
        with self.lock:
            self._priority, self._threshold = list(state.priority), list(state.threshold)
            self._pending, self._claimed, self._level = pending, claimed, level
            self._enable = enable
            self._update()

    def reset(self) -> None:
        """The lines are the devices' (they lower theirs when they are reset), the rest is ours."""
        with self.lock:
            self._clear()
            self._pending = self._level
            self._update()
