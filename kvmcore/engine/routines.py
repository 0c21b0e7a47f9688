"""Native routines: polling, traps, coming in and going out; and the tables of all routines.

`FUNCTIONS` are called and return two words (value, status), `HANDLERS` are entered by tail calls, with pc in
a0. Read by interpreter.py. What an access or a trap *means* is in kvmcore/isa; here is how it is made fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from kvmcore.engine import code_pages, hart_state, page_identity, running, softmmu, template_assembler, tlb
from kvmcore.engine.exits import ExitKind
from kvmcore.engine.native_hart import OK, PAGE_MASK, FunctionHart, HandlerHart, call, load, param, returns, store, tracer
from kvmcore.ir.value import select, u64
from kvmcore.isa import imsic, traps
from kvmcore.isa.hart import Hart

_TRAP_COUNTS = hart_state.SLICE // 64
"""Instructions: what a trap is worth where they are counted."""
_PASSED = 8192
"""Polls in a row that go on where a region begins, until Python looks around: some 50 ms."""


def poll(h: HandlerHart) -> None:
    """(a0 pc): look at other threads, time and interrupts; then go on there."""
    _look_around(h)
    h.tail("interrupts", param("a0"), u64(1))


def poll_region(h: HandlerHart) -> None:
    """poll without a sample: from a branch inside a region, which is translated already."""
    _look_around(h)
    h.tail("interrupts", param("a0"), u64(0))


def _look_around(h: HandlerHart) -> None:
    store(h.address("limit"), h.ic + hart_state.SLICE, "volatile")
    tracer().effect("fence", (), 0, ("seq_cst",))
    attention = h.get("attention")
    if attention != 0:
        h.tail("serve", param("a0"))


def serve(h: HandlerHart) -> None:
    """(a0 pc): somebody set `attention`."""
    pc = param("a0")
    attention = h.get("attention")
    if (attention & (hart_state.ATTENTION_KICK | hart_state.ATTENTION_STOP)) != 0:
        h.set("exit_kind", int(ExitKind.KICK))
        h.tail("leave", pc)
    h.atomic_and("attention", ~hart_state.ATTENTION_INTERRUPT)
    if (attention & hart_state.ATTENTION_BRIEF) != 0:
        h.atomic_and("attention", ~hart_state.ATTENTION_BRIEF)
        h.atomic_or("attention", hart_state.ATTENTION_KICK)
    if (attention & hart_state.ATTENTION_FLUSH_ICACHE) != 0:
        h.atomic_and("attention", ~hart_state.ATTENTION_FLUSH_ICACHE)  # what is asked for from now on is another flush
        call("flush_fetch", h.s)
    if (attention & hart_state.ATTENTION_FLUSH_TLB) != 0:
        h.atomic_and("attention", ~hart_state.ATTENTION_FLUSH_TLB)
        call("flush_tlb", h.s)
    h.tail("interrupts", pc)


def interrupts(h: HandlerHart) -> None:
    """(a0 pc, a1 whether to take a sample): take the interrupt that is due, or go on."""
    pc = param("a0")
    cause = traps.pending_interrupt(h)
    if cause != traps.NO_INTERRUPT:
        h.set("trap_cause", cause)
        h.set("trap_value", 0)
        h.tail("take_trap", pc)
    if (param("a1") != 0) & (h.get("sample_count") < hart_state.SAMPLES):
        h.tail("sample", pc)
    h.go(pc, h.ic)


def sample(h: HandlerHart) -> None:
    """(a0 pc): note where time is spent, for the translator; then go on there.

    One look every hart_state.SLICE instructions sees loops and what is called often, at no cost elsewhere.
    """
    pc = param("a0")
    entry = h.tlb + (((pc >> 12) & (hart_state.FETCH_TLB_ENTRIES - 1)) << 4)
    if load(entry + hart_state.FETCH_TLB_OFFSET) != (pc & PAGE_MASK):
        h.go(pc, h.ic)
    record = (pc << 2) + load(entry + (hart_state.FETCH_TLB_OFFSET + 8))
    if load(record, 32).zext(64) >= load(h.machine("regions")):
        passed = h.get("samples_passed") + 1
        h.set("samples_passed", passed & (_PASSED - 1))
        if passed == _PASSED:  # without samples nobody looks at what the translator has sent
            h.set("exit_kind", int(ExitKind.PROFILE))
            h.tail("leave", pc)
        h.go(pc, h.ic)
    count = h.get("sample_count")
    h.set_at("samples", count, pc)
    h.set_at("sample_records", count, record)
    h.set_at("sample_spaces", count, h.get("satp"))
    h.set("sample_count", count + 1)
    if count + 1 >= h.get("samples_wanted"):
        h.set("exit_kind", int(ExitKind.PROFILE))
        h.tail("leave", pc)
    h.go(pc, h.ic)


def take_trap(h: HandlerHart) -> None:
    """(a0 pc): trap_cause and trap_value are set."""
    if (h.get("attention") & hart_state.ATTENTION_KICK) != 0:  # a brief run: its end comes nearer, if it does but trap
        limit = h.get("limit")
        h.set("limit", select(limit > _TRAP_COUNTS, limit - _TRAP_COUNTS, u64(0)))
    h.set("count_trap", h.get("count_trap") + 1)
    traps.enter_trap(h, h.get("trap_cause"), h.get("trap_value"))


def trap_instruction(h: HandlerHart) -> None:
    """(a0 pc): as take_trap, with the instruction's bits as trap_value."""
    bits, status = call("instruction_bits", h.s, param("a0"))
    h.set("trap_value", select(status == OK, bits, u64(0)))
    h.tail("take_trap", param("a0"))


def enter(h: HandlerHart) -> None:
    """From outside: the guest's MXCSR, then look around, then pc."""
    h._fp.enter()
    h.tlb, _ = call("choose_tlb", h.s)
    h.tail("poll_region", h.get("pc"))  # where an exit has ended is no sample either


def leave(h: HandlerHart) -> None:
    """(a0 pc): to the outside; exit_kind is set."""
    h._fp.leave()
    h.set("pc", param("a0"))
    h.set("icount", h.ic)
    tracer().effect("leave", ())


def _imsic_top(h: FunctionHart) -> None:
    returns(imsic.top(cast(Hart, h)))


def leave_access(h: HandlerHart) -> None:
    """(a0 pc): an access left; Python completes it and needs the instruction."""
    kind = h.get("exit_kind")
    bits, _ = call("instruction_bits", h.s, param("a0"))
    h.set("exit_kind", kind)
    h.set("exit_insn", bits.trunc(32))
    h.tail("leave", param("a0"))


FUNCTIONS: dict[str, tuple[int, Callable[[FunctionHart], None]]] = {
    "top": (1, _imsic_top),
    "find_slot": (4, softmmu.find_slot),
    "find_memory": (3, softmmu.find_memory),
    "slot_of": (2, softmmu.slot_of),
    "table_memory": (2, softmmu.table_memory),
    "walk_load": (2, softmmu.walk_function("load")),
    "walk_store": (2, softmmu.walk_function("store")),
    "walk_fetch": (2, softmmu.walk_function("fetch")),
    "host_for_load": (3, softmmu.host_for_function(False)),
    "host_for_store": (3, softmmu.host_for_function(True)),
    **{f"slow_load_{size}": (2, softmmu.slow_load_function(size)) for size in (1, 2, 4, 8)},
    **{f"slow_store_{size}": (3, softmmu.slow_store_function(size)) for size in (1, 2, 4, 8)},
    **{f"again_load_{size}": (2, softmmu.again_load_function(size)) for size in (1, 2, 4, 8)},
    **{f"again_store_{size}": (3, softmmu.again_store_function(size)) for size in (1, 2, 4, 8)},
    "send_msi": (2, softmmu.send_msi),
    "atomic_address": (3, softmmu.atomic_address),
    "check_block": (2, softmmu.check_block),
    "acquire": (1, code_pages.acquire),
    "code_page": (2, code_pages.code_page),
    "decoded_page": (3, code_pages.decoded_page),
    "free_page": (1, code_pages.free_page),
    "find_page": (3, code_pages.find_page),
    "copy": (3, code_pages.copy),
    "zero": (2, code_pages.zero),
    "fetch_halfword": (2, code_pages.fetch_halfword),
    "fetch_page": (2, code_pages.fetch_page),
    "instruction_bits": (2, code_pages.instruction_bits),
    **tlb.FUNCTIONS,
    **running.FUNCTIONS,
    **template_assembler.FUNCTIONS,
    **page_identity.FUNCTIONS,
}

#: name -> (function, whether pc is a0 rather than the record's place)
HANDLERS: dict[str, tuple[Callable[[HandlerHart], None], bool]] = {
    "decode": (code_pages.decode_here, False),
    "straddle": (code_pages.straddle, True),
    "interpret": (code_pages.interpret, True),
    "resume": (code_pages.resume, False),
    "refill_load": (code_pages.refill_function("load"), False),
    "refill_store": (code_pages.refill_function("store"), False),
    "page_end": (code_pages.page_end, False),
    "fetch_miss": (code_pages.fetch_miss, True),
    "poll": (poll, True),
    "poll_region": (poll_region, True),
    "serve": (serve, True),
    "interrupts": (interrupts, True),
    "sample": (sample, True),
    "take_trap": (take_trap, True),
    "trap_instruction": (trap_instruction, True),
    "enter": (enter, True),
    "leave": (leave, True),
    "leave_access": (leave_access, True),
}
