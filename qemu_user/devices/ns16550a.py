"""The NS16550A UART: eight byte-wide registers, 16-byte receive FIFO, transmission that takes no time.

Registers and interrupt priorities after the PC16550D data sheet (National Semiconductor, 1995), section 8;
what Linux's 8250 driver and U-Boot's ns16550 rely on. Bytes go to a chardev; while it takes no more, THRE
stays clear, which holds the guest back. Baud rate and modem lines are kept but mean nothing.
"""

from __future__ import annotations

from collections import deque
from typing import Any, ClassVar, Literal

from qemu_user.backends.chardev.chardev import Chardev
from qemu_user.devices.device import Device, FdtNode, InterruptLine, Place, State, require

CLOCK_FREQUENCY = 3_686_400
FIFO_SIZE = 16

RBR, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
THR, DLL, DLM, FCR = 0, 0, 1, 2

IER_RDI, IER_THRI, IER_RLSI, IER_MSI = 1, 2, 4, 8
IIR_NONE, IIR_MSI, IIR_THRI, IIR_RDI, IIR_RLSI, IIR_TIMEOUT = 1, 0, 2, 4, 6, 0xC
IIR_FIFOS = 0xC0
FCR_ENABLE, FCR_CLEAR_RX, FCR_CLEAR_TX = 1, 2, 4
LCR_BREAK, LCR_DLAB = 0x40, 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 0x10
LSR_DR, LSR_OE, LSR_THRE, LSR_TEMT = 1, 2, 0x20, 0x40
MSR_DELTA_CTS, MSR_DELTA_DSR, MSR_TERI, MSR_DELTA_DCD = 1, 2, 4, 8
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
_CONNECTED = MSR_CTS | MSR_DSR | MSR_DCD
_TRIGGERS = (1, 4, 8, 14)


class Ns16550aState(State, frozen=True, tag="ns16550a", kw_only=True):
    """The registers, each a byte; `receive` the FIFO, oldest first; `transmit` what the chardev has not
    taken yet.
    """

    version: Literal[1] = 1
    ier: int
    fcr: int
    lcr: int
    mcr: int
    msr: int
    scr: int
    dll: int
    dlm: int
    overrun: bool
    thr_interrupt: bool
    receive: bytes
    transmit: bytes


class Ns16550a(Device):
    """The interrupt line is a level: asserted while IIR shows a cause."""

    compatible: ClassVar[str | list[str]] = "ns16550a"
    region_size = 0x100
    State = Ns16550aState

    def __init__(self, name: str, irq: InterruptLine, chardev: Chardev) -> None:
        super().__init__(name)
        self._irq, self._chardev = irq, chardev
        self._asserted = False
        self._clear()
        chardev.connect(self)

    def _clear(self) -> None:
        self._ier = self._fcr = self._lcr = self._scr = self._dlm = 0
        self._dll = 12
        self._mcr = MCR_OUT2
        self._msr = _CONNECTED
        self._overrun = self._thr_interrupt = False
        self._receive: deque[int] = deque()
        self._transmit = bytearray()

    # -- registers ---------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset > SCR:
            return self.bad_access(offset, size)
        with self.lock:
            if offset == LSR:  # what is polled
                return self._read_lsr()
            if offset == RBR:
                return self._dll if self._lcr & LCR_DLAB else self._read_rbr()
            if offset == IER:
                return self._dlm if self._lcr & LCR_DLAB else self._ier
            if offset == IIR:
                return self._read_iir()
            if offset == LCR:
                return self._lcr
            if offset == MCR:
                return self._mcr
            if offset == MSR:
                return self._read_msr()
            return self._scr

    def write(self, offset: int, size: int, value: int) -> None:
        if offset > SCR:
            self.bad_access(offset, size)
            return
        value &= 0xFF
        with self.lock:
            if offset == THR:
                if self._lcr & LCR_DLAB:
                    self._dll = value
                else:
                    self._write_thr(value)
            elif offset == IER:
                if self._lcr & LCR_DLAB:
                    self._dlm = value
                else:
                    self._write_ier(value)
            elif offset == FCR:
                self._write_fcr(value)
            elif offset == LCR:
                self._lcr = value
            elif offset == MCR:
                self._write_mcr(value)
            elif offset == SCR:
                self._scr = value
            # LSR and MSR are read-only to programs (8.6.4: writing LSR is for factory tests)

    def _read_rbr(self) -> int:
        if not self._receive:
            return 0
        value = self._receive.popleft()
        self._update()
        self._chardev.resume_input()
        return value

    def _read_iir(self) -> int:
        cause = self._cause()
        if cause == IIR_THRI:
            self._thr_interrupt = False
            self._update()
        return cause | (IIR_FIFOS if self._fcr & FCR_ENABLE else 0)

    def _read_lsr(self) -> int:
        value = (LSR_DR if self._receive else 0) | (0 if self._transmit else LSR_THRE | LSR_TEMT)
        if self._overrun:
            value |= LSR_OE
            self._overrun = False
            self._update()
        return value

    def _read_msr(self) -> int:
        if self._mcr & MCR_LOOP:
            lines = (MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)
            return sum(msr for mcr, msr in lines if self._mcr & mcr)
        value = self._msr
        self._msr &= 0xF0
        self._update()
        return value

    def _write_thr(self, value: int) -> None:
        if self._mcr & MCR_LOOP:
            self._push(value)
        elif self._transmit:
            if len(self._transmit) < FIFO_SIZE:
                self._transmit.append(value)
            else:
                self.counters.count("transmit_overrun")
        elif not self._chardev.write(bytes((value,))):
            self._transmit.append(value)
        self._thr_interrupt = not self._transmit
        self._update()

    def _write_ier(self, value: int) -> None:
        value &= 0x0F
        if value & ~self._ier & IER_THRI and not self._transmit:
            self._thr_interrupt = True  # enabling it with an empty holding register interrupts at once
        self._ier = value
        self._update()

    def _write_fcr(self, value: int) -> None:
        if (value ^ self._fcr) & FCR_ENABLE or value & FCR_CLEAR_RX:
            self._receive.clear()
            self._chardev.resume_input()
        if (value ^ self._fcr) & FCR_ENABLE or value & FCR_CLEAR_TX:
            self._transmit.clear()
            self._thr_interrupt = True
        self._fcr = value & 0xC9 if value & FCR_ENABLE else 0
        self._update()

    def _write_mcr(self, value: int) -> None:
        self._mcr = value & 0x1F
        self._update()

    # -- interrupts --------------------------------------------------------------------------------

    def _cause(self) -> int:
        if self._ier & IER_RLSI and self._overrun:
            return IIR_RLSI
        if self._ier & IER_RDI and self._receive:
            if not self._fcr & FCR_ENABLE or len(self._receive) >= _TRIGGERS[self._fcr >> 6]:
                return IIR_RDI
            # The time-out wants four character times of silence; characters take no time here.
            return IIR_TIMEOUT
        if self._ier & IER_THRI and self._thr_interrupt:
            return IIR_THRI
        if self._ier & IER_MSI and self._msr & 0x0F:
            return IIR_MSI
        return IIR_NONE

    def _update(self) -> None:
        wanted = self._cause() != IIR_NONE
        if wanted != self._asserted:
            self._asserted = wanted
            if wanted:
                self._irq.assert_line()
            else:
                self._irq.release_line()

    def _push(self, value: int) -> None:
        if len(self._receive) < (FIFO_SIZE if self._fcr & FCR_ENABLE else 1):
            self._receive.append(value)
        else:
            self._overrun = True
            self.counters.count("receive_overrun")

    # -- the chardev's side ------------------------------------------------------------------------

    def input_room(self) -> int:
        if self._mcr & MCR_LOOP:
            return 0
        return max(0, (FIFO_SIZE if self._fcr & FCR_ENABLE else 1) - len(self._receive))

    def receive(self, data: bytes) -> None:
        with self.lock:
            for value in data:
                self._push(value)
            self._update()
            self.changed()

    def output_ready(self) -> None:
        with self.lock:
            if self._transmit:
                del self._transmit[: self._chardev.write(self._transmit)]
                if not self._transmit:
                    self._thr_interrupt = True
                self._update()
                self.changed()

    def opened(self) -> None:
        pass

    def closed(self) -> None:
        pass

    def resized(self, rows: int, columns: int) -> None:
        pass

    # -- tree and state ----------------------------------------------------------------------------

    def fdt_node(self, place: Place) -> FdtNode:
        return FdtNode(
            f"serial@{place.base:x}",
            {**place.properties(self.compatible), "clock-frequency": CLOCK_FREQUENCY},
        )

    def save(self) -> Ns16550aState:
        with self.lock:
            return Ns16550aState(
                ier=self._ier,
                fcr=self._fcr,
                lcr=self._lcr,
                mcr=self._mcr,
                msr=self._msr,
                scr=self._scr,
                dll=self._dll,
                dlm=self._dlm,
                overrun=self._overrun,
                thr_interrupt=self._thr_interrupt,
                receive=bytes(self._receive),
                transmit=bytes(self._transmit),
            )

    def restore(self, state: Any) -> None:
        for name in ("fcr", "lcr", "msr", "scr", "dll", "dlm"):
            require(0 <= getattr(state, name) <= 0xFF, f"ns16550a: {name} is no byte")
        require(0 <= state.ier <= 0x0F and 0 <= state.mcr <= 0x1F, "ns16550a: reserved bits in ier or mcr")
        require(
            len(state.receive) <= FIFO_SIZE and len(state.transmit) <= FIFO_SIZE, "ns16550a: FIFO too long"
        )
        with self.lock:
            self._ier, self._fcr, self._lcr, self._mcr = state.ier, state.fcr, state.lcr, state.mcr
            self._msr, self._scr, self._dll, self._dlm = state.msr, state.scr, state.dll, state.dlm
            self._overrun, self._thr_interrupt = state.overrun, state.thr_interrupt
            self._receive, self._transmit = deque(state.receive), bytearray(state.transmit)
            self._update()
        self._chardev.poke()
        self._chardev.resume_input()

    def reset(self) -> None:
        with self.lock:
            self._clear()
            self._update()
        self._chardev.resume_input()
