"""Runs cases in process on our engine: tier 1 (native) or the reference, through kvmcore.engine's Machine
and Hart.

The window is an anonymous mapping that the machine has as its only memory slot. SBI calls come back as
exits and are answered here as the QEMU peer's shim answers them. Used by the differential tests only.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Sequence
from functools import cache

from kvmcore.engine import reference as reference_engine
from kvmcore.engine.exits import ExitKind
from kvmcore.engine.hart_state import EXTENSIONS
from kvmcore.engine.loader import Image
from kvmcore.engine.machine import Hart, Machine, SlotView
from tests.framework.cases import CSR_NAMES, END, WINDOW, WINDOW_SIZE, Case, Outcome

REFERENCE_LIMIT = 200_000
"""Instructions after which the reference gives up on a case."""
_U64 = (1 << 64) - 1
_DIRECT = ("sie", "stvec", "scounteren", "senvcfg", "sscratch", "sepc", "scause", "stval", "stimecmp", "satp")
_SSTATUS = (("sstatus_sie", 1, 1), ("sstatus_spie", 5, 1), ("sstatus_spp", 8, 1)) + (
    ("fs", 13, 3),
    ("sum", 18, 1),
    ("mxr", 19, 1),
)


@cache
def native_image() -> Image:
    """The engine's image, built if need be."""
    return Image.load()


class EnginePeer:
    """One machine with one hart. run() may be called any number of times."""

    def __init__(self, limit: float = 1.0, reference: bool = False, rounds: int = 1) -> None:
        """`limit`: seconds for a case. `reference`: Python instead of native code.

        `rounds`: how often a program is run, each time on what the last one has left in registers and memory.
        """
        self._limit = limit * (1 + rounds / 100)
        self._rounds = rounds
        self.retired = 0
        """Instructions of all cases so far."""
        self._reference = reference
        self._memory = mmap.mmap(-1, WINDOW_SIZE)
        self._machine = Machine(native_image(), max_harts=1)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._machine.set_slots([SlotView(WINDOW, WINDOW_SIZE, address)])
        self.hart = Hart(self._machine, 0, 0)
        self.hart.set_extensions(frozenset(EXTENSIONS) - {"ssaia", "zkr"})  # the QEMU peer has neither

    def run(self, cases: Sequence[Case]) -> list[Outcome]:
        """What is left of each case."""
        return [self._run(case) for case in cases]

    def _run(self, case: Case) -> Outcome:
        self._begin(case)
        before = self.hart.state.icount
        status = self._until_end(case, self._rounds)
        self.retired += self.hart.state.icount - before
        return self._outcome(status)

    def _begin(self, case: Case) -> None:
        """Everything as the case has it; decoded pages whose bytes are the same are used again."""
        hart, state = self.hart, self.hart.state
        self._memory[:] = case.image.ljust(WINDOW_SIZE, b"\0")
        hart.reset()
        hart.flush_tlb()
        hart.flush_icache()
        state.x[:] = [*case.x, 0]
        state.f[:] = case.f
        self._enter(case)

    def _again(self, case: Case) -> None:
        """The next round."""
        self._memory[case.fresh] = case.image[case.fresh]
        for register in case.keep:
            self.hart.state.x[register] = case.x[register]
        self._enter(case)

    def _enter(self, case: Case) -> None:
        """pc and CSRs as the case has them."""
        state = self.hart.state
        state.pc, state.mode = case.pc, int(not case.user)
        for name in _DIRECT:
            setattr(state, name, case.csrs[name])
        for name, shift, mask in _SSTATUS:
            setattr(state, name, case.csrs["sstatus"] >> shift & mask)
        state.sip = case.csrs["sip"] & 1 << 1
        state.fflags, state.frm = case.csrs["fcsr"] & 31, case.csrs["fcsr"] >> 5 & 7

    def _until_end(self, case: Case, rounds: int = 1) -> str:
        timer = threading.Timer(self._limit, self.hart.kick)
        if not self._reference:
            timer.start()
        try:
            status = self._round()
            for _ in range(rounds - 1):
                if status != "done":
                    break
                self._again(case)
                status = self._round()
            return status
        finally:
            timer.cancel()

    def _round(self) -> str:
        hart, state = self.hart, self.hart.state
        while True:
            if self._reference:
                kind = reference_engine.run(hart, REFERENCE_LIMIT) or ExitKind.KICK
            else:
                kind = hart.run()
            if kind == ExitKind.ECALL:
                if state.x[17] == END:
                    return "done"
                state.x[10], state.x[11] = _U64 - 1, 0
                hart.advance(4)
            elif kind == ExitKind.KICK:
                return "timeout"
            else:
                return f"exit {ExitKind(kind).name} at {state.pc:#x}, gpa {state.exit_gpa:#x}"

    def _outcome(self, status: str) -> Outcome:
        state = self.hart.state
        csrs = {name: int(getattr(state, name)) for name in _DIRECT}
        sstatus = 2 << 32 | sum(getattr(state, name) << shift for name, shift, _ in _SSTATUS)
        csrs["sstatus"] = sstatus | (1 << 63 if state.fs == 3 else 0)
        csrs["sip"] = state.sip | (1 << 5 if self._machine.time() >= state.stimecmp else 0)
        csrs["fcsr"] = state.fflags | state.frm << 5
        ordered = {name: csrs[name] for name in CSR_NAMES}
        return Outcome(status, state.pc, list(state.x)[:32], list(state.f), ordered, self._memory[:])
