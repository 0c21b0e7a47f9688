"""CSRs of a hart that is not running, read and written from outside: for ONE_REG and for the SBI's suspend.

The engine keeps sstatus and fcsr in pieces and computes parts of sip; here they are put together and taken
apart, with the same legal values as the guest's own CSR instructions (kvmcore/isa/csrs.py). Called by
one_reg.py on the vCPU's thread or while the vCPU is idle. Must never be used on a hart that is in native
code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmcore.isa.paging import LEVELS

if TYPE_CHECKING:
    from kvmcore.engine.machine import Hart

U64 = (1 << 64) - 1
SSI, STI, SEI = 1, 5, 9
"""Interrupts: bit numbers of sip and sie."""
SSIP, STIP, SEIP = 1 << SSI, 1 << STI, 1 << SEI
_SSTATUS = (
    ("sstatus_sie", 1, 1),
    ("sstatus_spie", 5, 1),
    ("sstatus_spp", 8, 1),
    ("fs", 13, 3),
    ("sum", 18, 1),
    ("mxr", 19, 1),
)
"""Field, lowest bit, mask."""
_ZERO_AT_RESET = (
    *(field for field, _, _ in _SSTATUS),
    *("pc", "frm", "fflags", "reservation_valid", "sie", "stvec", "sscratch", "sepc", "scause", "stval"),
    *("satp", "scounteren", "senvcfg", "siselect"),
)
_UXL_64 = 2 << 32
_SD = 1 << 63
_FS_DIRTY = 3
_SATP_BARE = 0
_CBIE_RESERVED = 2
_WRITABLE = {
    "sie": SSIP | STIP | SEIP,
    "stvec": U64 & ~2,
    "sepc": U64 & ~1,
    "scounteren": (1 << 32) - 1,
    "siselect": 0xFFF,
}
"""Bits that a CSR holds; those that are not here hold all."""


def read(hart: Hart, name: str) -> int:
    """The value of a supervisor CSR, or of fcsr."""
    state = hart.state
    if name == "sstatus":
        value = sum((int(getattr(state, field)) & mask) << bit for field, bit, mask in _SSTATUS) | _UXL_64
        return value | (_SD if state.fs == _FS_DIRTY else 0)
    if name == "sip":
        return pending(hart)
    if name == "fcsr":
        return int(state.frm) << 5 | int(state.fflags)
    return int(getattr(state, name))


def write(hart: Hart, name: str, value: int) -> None:
    """Write it as a CSR instruction would: bits that it does not have are dropped."""
    state = hart.state
    if name == "sstatus":
        for field, bit, mask in _SSTATUS:
            setattr(state, field, value >> bit & mask)
        hart.flush_tlb()
    elif name == "sip":
        # STIP follows the timer. An IMSIC's SEIP is its own; this bit is KVM_INTERRUPT's.
        state.sip = value & (SSIP | SEIP)
    elif name == "fcsr":
        state.frm, state.fflags = value >> 5 & 7, value & 0x1F
    elif name == "satp":
        if value >> 60 == _SATP_BARE or value >> 60 in LEVELS:
            state.satp = value
            hart.flush_tlb()
    elif name == "senvcfg":
        state.senvcfg = value & (0xF1 if value >> 4 & 3 != _CBIE_RESERVED else 0xC1)
    else:
        setattr(state, name, value & _WRITABLE.get(name, U64))


def begin(hart: Hart) -> None:
    """What the engine's fresh hart lacks of a new vCPU's state."""
    # CY, TM and IR, as kvm_arch_vcpu_create has it: guests' vDSOs read time, and no SBI call would open it.
    hart.state.scounteren = 7


def reset(hart: Hart) -> None:
    """The state of a new vCPU: 0 but for scounteren, S-mode, no timer. The interrupt file stays as it is: it
    is not the hart's, and other harts may be sending to it at this moment.
    """
    state = hart.state
    for field in _ZERO_AT_RESET:
        setattr(state, field, 0)
    for array in (state.x, state.f):
        array[:] = [0] * len(array)
    state.mode, state.stimecmp = 1, U64
    begin(hart)
    for interrupt in (SSI, SEI):
        hart.clear_pending(interrupt)
    hart.flush_tlb()
    hart.flush_icache()


def pending(hart: Hart) -> int:
    """sip: what is pending now, the timer's and the IMSIC's parts included."""
    state = hart.state
    value = int(state.sip)
    if hart.machine.time() >= state.stimecmp:
        value |= STIP
    if state.imsic_present and _imsic_delivers(hart):
        value |= SEIP
    return value


def _imsic_delivers(hart: Hart) -> bool:
    state = hart.state
    if not state.eidelivery:
        return False
    threshold = int(state.eithreshold)
    for word, (waiting, enabled) in enumerate(zip(state.eip, state.eie, strict=True)):
        ready = waiting & enabled
        if ready:
            identity = word * 64 + (ready & -ready).bit_length() - 1
            return not threshold or identity < threshold
    return False


def interrupt_pending(hart: Hart) -> bool:
    """Whether WFI would not wait: something pending is enabled in sie, whatever sstatus.SIE says."""
    return bool(pending(hart) & hart.state.sie)
