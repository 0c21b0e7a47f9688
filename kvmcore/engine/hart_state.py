"""THE layout of a hart: one table of fields, from which everything that knows the layout is derived.

Native code's offsets (native_hart.py, build.py), the ctypes structure that Python reads and writes. A field
is added here and nowhere else. x[] stands at offset 0: native code addresses registers by number alone.
Fields that other threads write are marked `shared`: native code and Python change them by atomic operations
only.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Field:
    """One field: `bits` 8, 16, 32 or 64; `count` elements, 0 for a scalar."""

    name: str
    bits: int
    doc: str
    count: int = 0
    shared: bool = False


def _f(name: str, bits: int, doc: str, count: int = 0, shared: bool = False) -> Field:
    return Field(name, bits, doc, count, shared)


X0_SINK = 32
"""Index in x[] of the slot that takes what instructions write to x0."""
DATA_TLB_ENTRIES = 512
"""Entries of 32 bytes: tag for loads, tag for stores, host minus guest address, mask of the memory around that has all
this in common (softmmu.reach)."""
FETCH_TLB_ENTRIES = 512
"""Entries of 16 bytes: tag, and what turns pc * 4 into a record's address."""
TLB_BLOCKS = 3
"""One each for U, S, and S with SUM: a bank."""
TLB_BANKS = 4
"""For so many values of satp translations are kept, so that a switch of address spaces forgets nothing."""
FILL_LOG = 128
"""Fills of a bank that are remembered one by one: forgetting few costs little."""
FETCH_TLB_OFFSET = DATA_TLB_ENTRIES * 32
BLOCK_STAMPS = FETCH_TLB_OFFSET + FETCH_TLB_ENTRIES * 16
"""Of a block: a number that no other content of a block ever has, for data entries, for fetch entries. What the second level
holds with another stamp is void."""
BLOCK_FOREIGN = BLOCK_STAMPS + 16
"""Whether there are data entries, fetch entries, that are not the same in all address spaces."""
TLB_BLOCK = BLOCK_STAMPS + 64
"""Bytes of one block: data entries, then fetch entries, then these four words."""
SECOND_SETS = {"data": 2048, "fetch": 2048}
"""Of the second level, two entries in each."""
SECOND_ENTRY = {"data": 40, "fetch": 24}
"""Bytes: tag, stamp, and what a TLB entry has behind its tag."""
TLB_BANK = TLB_BLOCKS * TLB_BLOCK
IMSIC_WORDS = 32
"""64-bit words of eip and eie: identities 0 to 2047."""
SLICE = 20_000
"""Instructions between two looks at time and other threads."""
SAMPLES, FEW_SAMPLES = 512, 64
"""At most, and at first, for an exit; one every SLICE instructions."""

FIELDS: tuple[Field, ...] = (
    # -- what every instruction may touch --------------------------------------------------------------------
    _f("x", 64, "integer registers; x[0] is 0 always, x[32] the sink of writes to x0", 33),
    _f("pc", 64, "address of the next instruction; current only while the hart is outside native code"),
    _f("icount", 64, "instructions retired; current only while the hart is outside native code"),
    _f("limit", 64, "a taken branch at icount >= limit goes to the slow path; 0 = at once", shared=True),
    _f("f", 64, "floating-point registers, singles NaN-boxed", 32),
    # -- privilege and sstatus, unpacked; csrs.py assembles the CSR ------------------------------------------
    _f("mode", 8, "privilege: 0 U, 1 S"),
    _f("fs", 8, "sstatus.FS: 0 off, 1 initial, 2 clean, 3 dirty"),
    _f("sstatus_sie", 8, "sstatus.SIE"),
    _f("sstatus_spie", 8, "sstatus.SPIE"),
    _f("sstatus_spp", 8, "sstatus.SPP"),
    _f("sum", 8, "sstatus.SUM"),
    _f("mxr", 8, "sstatus.MXR"),
    _f("frm", 8, "fcsr.FRM, any of 0 to 7"),
    _f("fflags", 8, "fcsr.FFLAGS; while in native code the rest of them is in the host's MXCSR"),
    _f("guest_debug", 8, "1: ebreak leaves the guest"),
    _f("imsic_present", 8, "1: this hart has an IMSIC"),
    _f("reservation_valid", 8, "bytes that LR reserved; 0: no reservation"),
    # -- supervisor CSRs -------------------------------------------------------------------------------------
    _f("sie", 64, "interrupt enables: bits 1, 5, 9"),
    _f("sip", 64, "SSIP and SEIP (KVM_INTERRUPT's); STIP and the IMSIC's SEIP are computed", shared=True),
    _f("stvec", 64, "trap vector"),
    _f("sscratch", 64, "scratch"),
    _f("sepc", 64, "trapped pc"),
    _f("scause", 64, "trap cause"),
    _f("stval", 64, "trap value"),
    _f("satp", 64, "address translation"),
    _f("scounteren", 64, "counters that U may read"),
    _f("senvcfg", 64, "environment configuration for U: FIOM, CBIE, CBCFE, CBZE"),
    _f("stimecmp", 64, "timer compare, Sstc; also set_timer of the SBI"),
    _f("siselect", 64, "indirect CSR select"),
    # -- IMSIC -----------------------------------------------------------------------------------------------
    _f("imsic_identities", 64, "identities 1 to this exist"),
    _f("eidelivery", 64, "IMSIC: 1 delivers interrupts", shared=True),
    _f("eithreshold", 64, "IMSIC: identities from this on are held back; 0 = none", shared=True),
    _f("eip", 64, "IMSIC: pending", IMSIC_WORDS, shared=True),
    _f("eie", 64, "IMSIC: enabled", IMSIC_WORDS, shared=True),
    # -- LR/SC -----------------------------------------------------------------------------------------------
    _f("reservation_address", 64, "host address that LR read"),
    _f("reservation_value", 64, "what LR read there, zero-extended"),
    # -- identity and configuration --------------------------------------------------------------------------
    _f("hartid", 64, "hart id"),
    _f("extensions", 64, "bit i: EXTENSIONS[i] is on"),
    _f("instret_base", 64, "added to icount for the instret CSR"),
    _f("dirty_budget", 64, "pages that may still become dirty before the exit DIRTY_BUDGET (signed)"),
    # -- the last exit ---------------------------------------------------------------------------------------
    _f("exit_kind", 32, "ExitKind"),
    _f("exit_errno", 32, "for ERROR"),
    _f("exit_len", 32, "bytes of the access"),
    _f("exit_csr", 32, "number of the CSR"),
    _f("exit_insn", 32, "bits of the instruction"),
    _f("exit_gpa", 64, "guest-physical address of the access"),
    _f("exit_va", 64, "virtual address of the access"),
    _f("exit_data", 64, "value stored, or new value of the CSR"),
    _f("exit_mask", 64, "bits of the CSR that are written"),
    # -- between threads -------------------------------------------------------------------------------------
    _f("attention", 32, "requests to the hart, bits ATTENTION_*", shared=True),
    _f("running", 32, "1: inside native code", shared=True),
    # -- native code's own -----------------------------------------------------------------------------------
    _f("trap_cause", 64, "exception raised by a helper: cause"),
    _f("trap_value", 64, "and its stval"),
    _f("walk_pte", 64, "result of a page walk: the leaf entry"),
    _f("walk_level", 64, "result of a page walk: its level, 0 for 4 KiB"),
    _f("machine", 64, "address of the MachineState"),
    _f("tlb", 64, "address of the TLB block in use: U, S, or S with SUM"),
    _f("context_satp", 64, "satp that the bank in use belongs to"),
    _f("context_mxr", 8, "sstatus.MXR that the bank in use belongs to"),
    _f("bank", 64, "number of the bank in use"),
    _f("next_bank", 64, "number of the one that is given up next"),
    _f("bank_satp", 64, "satp that a bank belongs to; all ones: to none", TLB_BANKS),
    _f("bank_epoch", 64, "code_epoch of a bank's fetch entries", TLB_BANKS),
    _f("data_fills", 64, "fills of a bank since it was cleared; more than FILL_LOG: nobody knows which", TLB_BANKS),
    _f("fetch_fills", 64, "the same of fetch entries", TLB_BANKS),
    _f("data_log", 64, "addresses of the entries filled", TLB_BANKS * (FILL_LOG + 1)),
    _f("fetch_log", 64, "the same of fetch entries", TLB_BANKS * (FILL_LOG + 1)),
    _f("host_mxcsr", 32, "the host's MXCSR while in native code"),
    _f("mxcsr", 32, "scratch for the guest's MXCSR"),
    _f("code_epoch", 64, "the machine's epoch at this hart's last fence.i"),
    _f("large_low", 64, "lowest address of a superpage in the TLBs: lower half, upper half", 2),
    _f("large_high", 64, "highest such address", 2),
    _f("straddle", 64, "the record of an instruction on two pages, at [2] the page-end record", 4),
    _f("tlb_blocks", 64, "the TLBs (see TLB_BLOCK)", TLB_BANKS * TLB_BANK // 8),
    _f("second_data", 64, "second level of the data TLBs", SECOND_SETS["data"] * 2 * SECOND_ENTRY["data"] // 8),
    _f("second_fetch", 64, "and of the fetch TLBs", SECOND_SETS["fetch"] * 2 * SECOND_ENTRY["fetch"] // 8),
    _f("last_stamp", 64, "the last stamp that was given"),
    _f("region_status", 64, "what region_load_* and region_store_* found: 0, or the interpreter does it"),
    _f("sample_count", 64, "samples taken since Python has looked; SAMPLES: none are taken"),
    _f("fresh_page", 64, "decoded page that was made, or began anew, since Python has looked; 0: none"),
    _f("samples_wanted", 64, "so many are an exit"),
    _f("samples_passed", 64, "polls since then that were no samples, for they go on in a region"),
    _f("samples", 64, "where the poll went on, and no region begins", SAMPLES),
    _f("sample_records", 64, "the records there", SAMPLES),
    _f("sample_spaces", 64, "satp then", SAMPLES),
    # -- KVM_RUN without Python (running.py) -------------------------------------------------------------------
    _f("wake", 32, "futex: changes when a sleeping hart has to look around", shared=True),
    _f("sleeping", 32, "1: waits on `wake`", shared=True),
    _f("owner", 32, "1: somebody executes an ioctl of the vCPU, KVM_RUN included", shared=True),
    _f("summons", 32, "1: Python has work for the thread that waits for the doorbell", shared=True),
    _f("served", 32, "number of the last RUN that was taken from the doorbell"),
    _f("ready", 8, "1: the next RUN needs nothing that only Python does"),
    _f("run_page", 64, "host address of kvm_run's page; 0: exits are not written there"),
    _f("in_bus", 32, "1: looks at the bus and the memory slots from outside guest code", shared=True),
    _f("pending_access", 64, "what the next RUN completes (completion.packed); 0: no MMIO exit"),
    _f("spin", 64, "score of spinning at the doorbell (running.BEST_SCORE), signed"),
    _f("halt_spin", 64, "the same in WFI"),
    _f("pauses", 64, "of the loop that the hart waits in (running.relax)"),
    _f("paused_at", 64, "icount of the last of them"),
    _f("timeout", 64, "scratch: a struct timespec", 2),
    _f("exits", 64, "statistics (vm/statistics.py), here and below"),
    _f("mmio_exit_user", 64, ""),
    _f("mmio_exit_kernel", 64, ""),
    _f("wfi_exit_stat", 64, ""),
    _f("blocking", 64, ""),
    _f("halt_successful_poll", 64, ""),
    _f("halt_attempted_poll", 64, ""),
    _f("halt_wakeup", 64, ""),
    _f("halt_poll_success_ns", 64, ""),
    _f("halt_poll_fail_ns", 64, ""),
    _f("halt_wait_ns", 64, ""),
    _f("halt_wait_hist", 64, "", 32),
    # -- counters --------------------------------------------------------------------------------------------
    _f("count_fill", 64, "data TLB misses"),
    _f("count_fetch_fill", 64, "fetch TLB misses"),
    _f("count_trap", 64, "exceptions and interrupts taken"),
    _f("count_page", 64, "code pages made"),
    _f("count_flush", 64, "TLB flushes"),
)

ATTENTION_KICK = 1
"""Leave native code with KICK."""
ATTENTION_INTERRUPT = 2
"""Look at the pending interrupts."""
ATTENTION_FLUSH_TLB = 4
"""Forget all translations."""
ATTENTION_FLUSH_ICACHE = 8
"""fence.i."""
ATTENTION_STOP = 16
"""quiesce(): leave native code and do not enter it."""
ATTENTION_BRIEF = 32
"""Become KICK when it is seen: set before the hart enters native code, it lets it run for SLICE instructions."""

EXTENSIONS = (
    "m", "a", "f", "d", "c", "zicsr", "zifencei", "zicntr", "zihpm", "zba", "zbb", "zbs",
    "zicbom", "zicboz", "sstc", "svadu", "ssaia", "zkr", "zicond",
)  # fmt: skip
"""Extensions that can be switched per hart: bit numbers of the field `extensions`."""

_TYPES = {8: ctypes.c_uint8, 16: ctypes.c_uint16, 32: ctypes.c_uint32, 64: ctypes.c_uint64}


class HartState(ctypes.Structure):
    """The state of one hart as Python sees it; fields as in FIELDS, all unsigned."""

    _fields_ = [(field.name, _TYPES[field.bits] * field.count if field.count else _TYPES[field.bits]) for field in FIELDS]

    def __getattr__(self, name: str) -> Any:  # for the type checker: fields are made from the table
        raise AttributeError(name)


SIZE = ctypes.sizeof(HartState)
BY_NAME: dict[str, Field] = {field.name: field for field in FIELDS}


def offset(name: str) -> int:
    """Byte offset of a field."""
    return int(getattr(HartState, name).offset)
