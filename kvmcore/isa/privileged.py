"""ecall, ebreak, and the supervisor's sret, wfi, sfence.vma (Privileged ISA, chapters 3.3 and 12.2)."""

from __future__ import annotations

from kvmcore.isa import traps
from kvmcore.isa.describe import insn
from kvmcore.isa.hart import Hart, Reg
from kvmcore.isa.traps import Trap, illegal_instruction


def _supervisor_only(h: Hart) -> None:
    if h.get("mode") == 0:
        raise illegal_instruction()


@insn("ecall", "00000000000000000000000001110011")
def ecall(h: Hart) -> None:
    """From U-mode a trap; from S-mode a hypercall: the SBI."""
    if h.get("mode") == 0:
        raise Trap(traps.ECALL_FROM_U, 0)
    h.exit("ECALL")


@insn("ebreak", "00000000000100000000000001110011")
def ebreak(h: Hart) -> None:
    """3.3.1; under guest debugging user space gets it."""
    if h.get("guest_debug") != 0:
        h.exit("EBREAK")
    raise Trap(traps.BREAKPOINT, h.pc)


@insn("sret", "00010000001000000000000001110011")
def sret(h: Hart) -> None:
    """3.3.2, 12.1.1: back to the mode and interrupt enable before the trap."""
    _supervisor_only(h)
    h.set("mode", h.get("sstatus_spp"))
    h.set("sstatus_sie", h.get("sstatus_spie"))
    h.set("sstatus_spie", 1)
    h.set("sstatus_spp", 0)
    h.context_changed()
    h.check_interrupts(h.get("sepc"))


@insn("wfi", "00010000010100000000000001110011")
def wfi(h: Hart) -> None:
    """3.3.3: goes on when an enabled interrupt is pending, whether or not it will be taken."""
    _supervisor_only(h)
    if (traps.pending(h) & h.get("sie")) != 0:
        h.check_interrupts()
    h.exit("WFI")


@insn("sfence.vma", "0001001 rs2 rs1 000 00000 1110011")
def sfence_vma(h: Hart, rs1: Reg, rs2: Reg) -> None:
    """12.2.1: rs1 is the address or x0 for all, rs2 the address space or x0 for all."""
    _supervisor_only(h)
    if rs1 == 0:
        h.sfence_vma(None, h.x[rs2] if rs2 != 0 else None)
    else:
        h.sfence_vma(h.x[rs1], None)
