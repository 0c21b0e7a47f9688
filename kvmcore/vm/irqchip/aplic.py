"""The APLIC in MSI delivery mode: wired sources become MSIs to the harts' IMSICs (AIA chapter 4).

Driven by the guest's loads and stores (aia.py), by lines (KVM_IRQ_LINE, irqfd) and by the AIA device's
attributes, which are its registers. One supervisor domain; no delegation, no direct mode. Behaviour
follows Linux's in-kernel model. Thread-safe: vCPU threads and the I/O thread call in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from errno import ENODEV, EOPNOTSUPP

from protocol.abi.errors import KvmError

DOMAINCFG, SOURCECFG = 0x0000, 0x0004
SETIP, SETIPNUM, CLRIP, CLRIPNUM = 0x1C00, 0x1CDC, 0x1D00, 0x1DDC
SETIE, SETIENUM, CLRIE, CLRIENUM = 0x1E00, 0x1EDC, 0x1F00, 0x1FDC
SETIPNUM_LE, SETIPNUM_BE, GENMSI, TARGET = 0x2000, 0x2004, 0x3000, 0x3004
DOMAINCFG_READ_ONLY = 0x80000004
"""domaincfg's fixed bits: MSI delivery mode, little endian."""
DOMAINCFG_IE = 0x100

INACTIVE, DETACHED, EDGE_RISE, EDGE_FALL, LEVEL_HIGH, LEVEL_LOW = 0, 1, 4, 5, 6, 7
_SOURCECFG_DELEGATE = 0x400
_TARGET_MASK = 0x3FFF << 18 | 0x3F << 12 | 0x7FF
_GENMSI_MASK = 0x3FFF << 18 | 0x7FF

SendMsi = Callable[[int, int, int], None]
"""send(hart index, guest index, interrupt identity): deliver an MSI; one that matches nobody vanishes."""


class _Source:
    __slots__ = ("enabled", "input", "mode", "pending", "target")

    def __init__(self) -> None:
        self.mode = INACTIVE
        self.target = 0
        self.input = False
        self.pending = False
        self.enabled = False

    @property
    def is_level(self) -> bool:
        return self.mode in (LEVEL_HIGH, LEVEL_LOW)

    @property
    def rectified(self) -> bool:
        """The source's input as the mode sees it."""
        if self.mode in (INACTIVE, DETACHED):
            return False
        return self.input != (self.mode in (LEVEL_LOW, EDGE_FALL))


class Aplic:
    """Registers and lines of the domain. `sources` wired sources, numbered from 1."""

    def __init__(self, sources: int, send: SendMsi, retriggered: Callable[[int], bool]) -> None:
        """`retriggered(source)`: the guest ended a level interrupt by setipnum; True if its line is to
        fall.
        """
        self.sources = sources
        self._send = send
        self._retriggered = retriggered
        self._lock = threading.RLock()
        self._irqs = [_Source() for _ in range(sources + 1)]
        self._words = (sources + 32) // 32
        self._enabled = False
        self._genmsi = 0

    # -- lines -------------------------------------------------------------------------------------

    def set_line(self, source: int, level: bool) -> None:
        """The wire of a source has this level. ENODEV: no such source."""
        if not 0 < source <= self.sources:
            raise KvmError(ENODEV, reason=f"interrupt source {source}")
        with self._lock:
            irq = self._irqs[source]
            if irq.mode == EDGE_RISE:
                rises = level and not irq.input
            elif irq.mode == EDGE_FALL:
                rises = not level and irq.input
            else:
                rises = (irq.mode == LEVEL_HIGH and level) or (irq.mode == LEVEL_LOW and not level)
            irq.input = level
            if rises:
                irq.pending = True
            self._deliver(irq)

    def _deliver(self, irq: _Source) -> None:
        if self._enabled and irq.pending and irq.enabled:
            irq.pending = False
            self._send(irq.target >> 18 & 0x3FFF, irq.target >> 12 & 0x3F, irq.target & 0x7FF)

    # -- registers ---------------------------------------------------------------------------------

    def read(self, offset: int) -> int:
        """A register's 32 bits. EOPNOTSUPP: unaligned; ENODEV: no register there."""
        kind, index = self._locate(offset)
        with self._lock:
            if kind == DOMAINCFG:
                return DOMAINCFG_READ_ONLY | (DOMAINCFG_IE if self._enabled else 0)
            if kind == SOURCECFG:
                return self._irqs[index].mode
            if kind == TARGET:
                return self._irqs[index].target
            if kind == GENMSI:
                return self._genmsi
            if kind == SETIP:
                return self._word(index, lambda irq: irq.pending)
            if kind == CLRIP:
                return self._word(index, lambda irq: irq.rectified)
            if kind == SETIE:
                return self._word(index, lambda irq: irq.enabled)
        return 0

    def write(self, offset: int, value: int) -> None:
        """Write a register; values that a register cannot hold are masked. EOPNOTSUPP, ENODEV as read()."""
        kind, index = self._locate(offset)
        with self._lock:
            if kind == DOMAINCFG:
                self._enabled = bool(value & DOMAINCFG_IE)
            elif kind == SOURCECFG:
                mode = 0 if value & _SOURCECFG_DELEGATE else value & 7
                irq = self._irqs[index]
                irq.mode = mode if mode not in (2, 3) else INACTIVE
                if irq.mode == INACTIVE:
                    irq.pending = irq.enabled = False
                elif irq.is_level and irq.rectified:
                    irq.pending = True  # the line was up before anybody said that it matters
            elif kind == TARGET:
                self._irqs[index].target = value & _TARGET_MASK
            elif kind == GENMSI:
                self._genmsi = value & _GENMSI_MASK
                self._send(self._genmsi >> 18, 0, self._genmsi & 0x7FF)
            elif kind in (SETIP, CLRIP, SETIE, CLRIE):
                for bit in range(32):
                    if value >> bit & 1:
                        self._set(kind, index * 32 + bit)
            elif kind in (SETIPNUM, SETIPNUM_LE):
                self._set_pending_by_number(value)
            elif kind == SETIPNUM_BE:
                self._set_pending_by_number(int.from_bytes(value.to_bytes(4, "little"), "big"))
            else:
                self._set({CLRIPNUM: CLRIP, SETIENUM: SETIE, CLRIENUM: CLRIE}[kind], value)
            self._deliver_all()

    def _set_pending_by_number(self, source: int) -> None:
        """setipnum: how a driver ends a level-sensitive interrupt in MSI mode (AIA 4.9.2), and software
        raises one.
        """
        if 0 < source <= self.sources and self._irqs[source].is_level and self._retriggered(source):
            self._irqs[source].input = self._irqs[source].mode == LEVEL_LOW
        self._set(SETIP, source)

    def _set(self, kind: int, source: int) -> None:
        if not 0 < source <= self.sources:
            return
        irq = self._irqs[source]
        if irq.mode == INACTIVE:
            return
        if kind == SETIP:
            if not irq.is_level or irq.rectified:
                irq.pending = True
        elif kind == CLRIP:
            irq.pending = False
        else:
            irq.enabled = kind == SETIE

    def _deliver_all(self) -> None:
        if self._enabled:
            for irq in self._irqs:
                self._deliver(irq)

    def _word(self, index: int, of: Callable[[_Source], bool]) -> int:
        value = 0
        for bit, irq in enumerate(self._irqs[index * 32 : index * 32 + 32]):
            if index * 32 + bit and of(irq):
                value |= 1 << bit
        return value

    def _locate(self, offset: int) -> tuple[int, int]:
        """(register, index) for an offset: bases for arrays, the offset itself for single registers."""
        if offset & 3:
            raise KvmError(EOPNOTSUPP, reason="APLIC registers are 32 bits wide")
        if offset in _SINGLE:
            return offset, 0
        if SOURCECFG <= offset < SOURCECFG + 4 * self.sources:
            return SOURCECFG, (offset - SOURCECFG) // 4 + 1
        if TARGET <= offset < TARGET + 4 * self.sources:
            return TARGET, (offset - TARGET) // 4 + 1
        for base in (SETIP, CLRIP, SETIE, CLRIE):
            if base <= offset < base + 4 * self._words:
                return base, (offset - base) // 4
        raise KvmError(ENODEV, reason=f"no APLIC register at {offset:#x}")


_SINGLE = frozenset((DOMAINCFG, SETIPNUM, CLRIPNUM, SETIENUM, CLRIENUM, SETIPNUM_LE, SETIPNUM_BE, GENMSI))
