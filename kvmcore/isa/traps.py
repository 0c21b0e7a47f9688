"""Traps: their causes, how S-mode is entered, and which interrupt is due (Privileged ISA, chapter 12).

All traps of the guest go to S-mode, as KVM's delegation gives it: there is no M-mode here. The engines turn
a raised `Trap` into `enter_trap`. Never decides anything about SBI: an ecall from S-mode is an exit.
"""

from __future__ import annotations

from typing import NoReturn

from kvmcore.ir.value import Value, select, u64
from kvmcore.isa import imsic
from kvmcore.isa.hart import Hart

INSTRUCTION_ACCESS_FAULT = 1
ILLEGAL_INSTRUCTION = 2
BREAKPOINT = 3
LOAD_MISALIGNED = 4
LOAD_ACCESS_FAULT = 5
STORE_MISALIGNED = 6
STORE_ACCESS_FAULT = 7
ECALL_FROM_U = 8
INSTRUCTION_PAGE_FAULT = 12
LOAD_PAGE_FAULT = 13
STORE_PAGE_FAULT = 15


class Trap(Exception):
    """Ends the instruction with an exception; nothing of it has been written yet.

    tval: what stval gets; None means the instruction's own bits (illegal instructions, 12.1.9).
    """

    def __init__(self, cause: int, tval: Value | int | None) -> None:
        super().__init__(cause, tval)
        self.cause = cause
        self.tval = tval


def illegal_instruction() -> Trap:
    """The exception for an instruction that does not exist, or not here and now."""
    return Trap(ILLEGAL_INSTRUCTION, None)


#: scause of interrupts: bit 63 and the number. Priority order of 12.1.3: external, software, timer.
INTERRUPT = 1 << 63
SSI, STI, SEI = 1, 5, 9
NO_INTERRUPT = 0


def pending(h: Hart, stored: Value | None = None) -> Value:
    """sip as the guest reads it: stored bits, the timer's level, the external line and the IMSIC's.

    stored: what the field sip holds, where the caller has just changed it.
    """
    stored = h.get("sip") if stored is None else stored
    timer = select(h.time() >= h.get("stimecmp"), 1 << STI, u64(0))
    if h.get("imsic_present") != 0 and imsic.deliverable(h) != 0:
        return stored | timer | (1 << SEI)
    return stored | timer


def pending_interrupt(h: Hart) -> Value:
    """scause of the interrupt that is taken before the next instruction, or NO_INTERRUPT (12.1.3)."""
    enabled = (h.get("mode") == 0) | (h.get("sstatus_sie") != 0)
    if ~enabled:
        return u64(NO_INTERRUPT)
    due = pending(h) & h.get("sie")
    cause = select((due & (1 << STI)) != 0, u64(INTERRUPT | STI), u64(NO_INTERRUPT))
    cause = select((due & (1 << SSI)) != 0, u64(INTERRUPT | SSI), cause)
    return select((due & (1 << SEI)) != 0, u64(INTERRUPT | SEI), cause)


def enter_trap(h: Hart, cause: Value, tval: Value) -> NoReturn:
    """Enter S-mode's handler for a trap at h.pc (12.1.1 to 12.1.9); goes on at stvec."""
    h.set("sepc", h.pc)
    h.set("scause", cause)
    h.set("stval", tval)
    h.set("sstatus_spp", h.get("mode"))
    h.set("sstatus_spie", h.get("sstatus_sie"))
    h.set("sstatus_sie", 0)
    h.set("mode", 1)
    h.context_changed()
    stvec = h.get("stvec")
    vectored = ((cause >> 63) & stvec & 1) != 0
    h.jump((stvec & ~3) + select(vectored, (cause & 63) << 2, u64(0)))
