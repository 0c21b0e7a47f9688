"""The reference: semantics run on known Values, one instruction at a time, over the same state as native code.

Used for tests, for `--accel reference`, and for the rare instruction that native code hands over (EMULATE). Slow;
translates every access by a walk; atomic only as far as the GIL reaches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from errno import EFAULT, EIO, EOPNOTSUPP
from typing import TYPE_CHECKING, Any, NoReturn

from kvmcore.engine import hart_state, machine_state
from kvmcore.engine.exits import ExitKind
from kvmcore.ir.value import Value, as_value, const, u64
from kvmcore.isa import paging, softfloat, traps
from kvmcore.isa.table import Insn, find
from kvmcore.isa.traps import Trap

if TYPE_CHECKING:
    from kvmcore.engine.machine import Hart

U64 = (1 << 64) - 1
_PAGE = 4096


class Done(Exception):
    """The instruction is finished and has set pc itself."""


class Left(Exception):
    """The instruction left with exit_kind; pc is where ExitKind says."""


class _Registers:
    def __init__(self, array: Any, zero: bool) -> None:
        self._array, self._zero = array, zero

    def __getitem__(self, number: Value | int) -> Value:
        return u64(self._array[int(number)])

    def __setitem__(self, number: Value | int, value: Value) -> None:
        self._array[int(number)] = int(as_value(value, 64))


class ReferenceHart:
    """kvmcore/isa/hart.py's protocol over a hart's block; one object per hart, reused for every instruction."""

    def __init__(self, hart: Hart) -> None:
        self._hart = hart
        self._state = hart.state
        self.x = _Registers(hart.state.x, True)
        self.f = _Registers(hart.state.f, False)
        self.pc = u64(0)
        self.length = 4
        self.raw = 0

    # -- state -------------------------------------------------------------------------------------------------
    def get(self, name: str) -> Value:
        return Value(hart_state.BY_NAME[name].bits, int(getattr(self._state, name)))

    def set(self, name: str, value: Value | int) -> None:
        setattr(self._state, name, int(as_value(value, hart_state.BY_NAME[name].bits)))

    def get_at(self, name: str, index: Value | int) -> Value:
        return Value(hart_state.BY_NAME[name].bits, int(getattr(self._state, name)[int(index)]))

    def set_at(self, name: str, index: Value | int, value: Value | int) -> None:
        getattr(self._state, name)[int(index)] = int(as_value(value, hart_state.BY_NAME[name].bits))

    def _field_address(self, name: str, index: Value | int) -> int:
        size = hart_state.BY_NAME[name].bits // 8
        return ctypes.addressof(self._state) + hart_state.offset(name) + size * int(index)

    def atomic_or(self, name: str, value: Value | int, index: Value | int = 0) -> Value:
        old = self._hart.machine.image.atomic_or(self._field_address(name, index), int(as_value(value, 64)))
        return u64(old)

    def atomic_and(self, name: str, value: Value | int, index: Value | int = 0) -> Value:
        old = self._hart.machine.image.atomic_and(self._field_address(name, index), int(as_value(value, 64)))
        return u64(old)

    def routine(self, function: Callable[[Any], Value]) -> Value:
        return function(self)

    def enabled(self, extension: str) -> Value:
        return const(1, self._state.extensions >> hart_state.EXTENSIONS.index(extension))

    # -- the end of an instruction ---------------------------------------------------------------------------------
    def _go(self, target: Value) -> NoReturn:
        self._state.pc = int(target)
        raise Done

    def branch(self, offset: Value) -> NoReturn:
        self._go(self.pc + offset)

    def jump(self, target: Value) -> NoReturn:
        self._go(target)

    def check_interrupts(self, target: Value | None = None) -> NoReturn:
        self._go(target if target is not None else self.pc + self.length)

    def exit(self, kind: str) -> NoReturn:
        self._state.exit_kind = ExitKind[kind]
        if kind == "WFI":
            self._state.pc = int(self.pc + self.length)
        raise Left

    def _fail(self, errno: int) -> NoReturn:
        self._state.exit_errno = errno
        self.exit("ERROR")

    # -- memory --------------------------------------------------------------------------------------------------
    def _slot(self, gpa: int) -> machine_state.Slot | None:
        machine = self._hart.machine.state
        slots = ctypes.cast(int(machine.slots), ctypes.POINTER(machine_state.Slot))
        for index in range(machine.slot_count):
            if slots[index].start <= gpa < slots[index].end:
                return slots[index]
        return None

    def _translate(self, va: Value, access: str) -> int:
        self._walk_fault, self._walk_va = _ACCESS_FAULTS[access], int(va)
        while True:
            try:
                return int(paging.translate(self, va, access)[0])
            except paging.Retry:
                continue

    def _dirty(self, slot: machine_state.Slot, gpa: int) -> None:
        if slot.dirty:
            page = (gpa - slot.start) >> 12
            word = slot.dirty + 8 * (page >> 6)
            old = self._hart.machine.image.atomic_or(word, 1 << (page & 63))
            if not old >> (page & 63) & 1:
                self._state.dirty_budget = (self._state.dirty_budget - 1) & U64

    def _host(self, address: Value, size: int, access: str, data: int = 0) -> int:
        """Host address of an access inside one page; leaves where there is no memory."""
        gpa = self._translate(address, access)
        slot = self._slot(gpa)
        state = self._state
        if slot is not None and slot.flags & machine_state.SLOT_ABSENT:
            self._fail(EFAULT)
        if slot is None or (access == "store" and slot.flags & machine_state.SLOT_READONLY):
            state.exit_gpa, state.exit_va, state.exit_len = gpa, int(address), size
            state.exit_data, state.exit_insn = data, self.raw
            self.exit("MMIO_WRITE" if access == "store" else "MMIO_READ")
        if access == "store":
            self._dirty(slot, gpa)
        return int((gpa + slot.delta) & U64)

    def _pieces(self, address: Value, size: int) -> list[tuple[Value, int]]:
        room = _PAGE - int(address) % _PAGE
        return [(address, size)] if size <= room else [(address, room), (address + room, size - room)]

    def load(self, address: Value, size: int) -> Value:
        pieces = self._pieces(address, size)
        data = b""
        for at, length in pieces:
            try:
                data += ctypes.string_at(self._host(at, length, "load"), length)
            except Left:
                if len(pieces) > 1 and self._state.exit_kind == ExitKind.MMIO_READ:
                    self._state.exit_kind, self._state.exit_errno = ExitKind.ERROR, EIO
                raise
        return const(8 * size, int.from_bytes(data, "little"))

    def store(self, address: Value, value: Value) -> None:
        size = value.width // 8
        data = int(value).to_bytes(size, "little")
        pieces = self._pieces(address, size)
        hosts = []
        for at, length in pieces:
            try:
                hosts.append((self._host(at, length, "store", int(value)), length))
            except Left:
                if len(pieces) > 1 and self._state.exit_kind == ExitKind.MMIO_WRITE:
                    self._state.exit_kind, self._state.exit_errno = ExitKind.ERROR, EIO
                raise
        done = 0
        for host, length in hosts:
            ctypes.memmove(host, data[done : done + length], length)
            done += length

    def _exclusive(self, address: Value, size: int, access: str) -> int:
        try:
            return self._host(address, size, access)
        except Left:
            if self._state.exit_kind in (ExitKind.MMIO_READ, ExitKind.MMIO_WRITE):
                self._state.exit_kind, self._state.exit_errno = ExitKind.ERROR, EOPNOTSUPP
            raise

    def load_reserved(self, address: Value, size: int) -> Value:
        host = self._exclusive(address, size, "load")
        value = int.from_bytes(ctypes.string_at(host, size), "little")
        state = self._state
        state.reservation_address, state.reservation_value, state.reservation_valid = host, value, size
        return const(8 * size, value)

    def store_conditional(self, address: Value, value: Value) -> Value:
        size = value.width // 8
        host = self._exclusive(address, size, "store")
        state = self._state
        held = state.reservation_valid == size and state.reservation_address == host
        state.reservation_valid = 0
        if not held or int.from_bytes(ctypes.string_at(host, size), "little") != state.reservation_value:
            return const(1, 1)
        ctypes.memmove(host, int(value).to_bytes(size, "little"), size)
        return const(1, 0)

    def amo(self, operation: str, address: Value, value: Value) -> Value:
        size = value.width // 8
        host = self._exclusive(address, size, "store")
        old = const(8 * size, int.from_bytes(ctypes.string_at(host, size), "little"))
        new = _AMO[operation](old, value)
        ctypes.memmove(host, int(new).to_bytes(size, "little"), size)
        return old

    def zero_block(self, address: Value, size: int) -> None:
        host = self._exclusive(address, 1, "store")
        ctypes.memset(host & -size, 0, size)

    def check_block(self, address: Value) -> None:
        try:
            self._translate(address, "load")
        except Trap:
            self._translate(address, "store")

    def load_physical(self, address: Value) -> Value:
        slot = self._slot(int(address))
        if slot is None or slot.flags & machine_state.SLOT_ABSENT:
            raise Trap(self._walk_fault, self._walk_va)
        data = ctypes.string_at((int(address) + slot.delta) & U64, 8)
        return u64(int.from_bytes(data, "little"))

    def cas_physical(self, address: Value, old: Value, new: Value) -> Value:
        slot = self._slot(int(address))
        if slot is None or slot.flags:
            raise Trap(self._walk_fault, self._walk_va)
        host = (int(address) + slot.delta) & U64
        if int.from_bytes(ctypes.string_at(host, 8), "little") != int(old):
            return const(1, 0)
        self._dirty(slot, int(address))
        ctypes.memmove(host, int(new).to_bytes(8, "little"), 8)
        return const(1, 1)

    _walk_fault, _walk_va = traps.LOAD_ACCESS_FAULT, 0

    # -- fences: nothing is cached ---------------------------------------------------------------------------------
    def fence(self, pred: Value, succ: Value) -> None:
        pass

    def fence_i(self) -> None:
        self._hart.flush_icache()  # native code may run next

    def sfence_vma(self, address: Value | None, asid: Value | None) -> None:
        self._hart.flush_tlb()

    def context_changed(self) -> None:
        pass  # native code looks at satp when it is entered

    # -- arithmetic and time -----------------------------------------------------------------------------------------
    def fp(self, operation: str, args: tuple[Value, ...], rm: Value | int | None = None) -> Value:
        mode = softfloat.RNE if rm is None else int(rm)
        if mode == 7:
            mode = self._state.frm
        bits, flags = softfloat.evaluate(operation, tuple(int(arg) for arg in args), mode)
        self._state.fflags |= flags
        return const(_result_width(operation), bits)

    def time(self) -> Value:
        return u64(self._hart.machine.time())

    def instret(self) -> Value:
        return u64(self._state.icount)

    # -- one instruction ---------------------------------------------------------------------------------------------
    def _fetch(self) -> int:
        low = self._fetch_halfword(self.pc)
        return low | self._fetch_halfword(self.pc + 2) << 16 if low & 3 == 3 else low

    def _fetch_halfword(self, va: Value) -> int:
        slot = self._slot(gpa := self._translate(va, "fetch"))
        if slot is None or slot.flags & machine_state.SLOT_ABSENT:
            raise Trap(traps.INSTRUCTION_ACCESS_FAULT, va)
        return int.from_bytes(ctypes.string_at((gpa + slot.delta) & U64, 2), "little")

    def step(self) -> int:
        """Execute the instruction at pc, its traps included; the ExitKind if it left, else NONE."""
        state = self._state
        self.pc, self.length, self.raw = u64(state.pc), 4, 0
        try:
            self.raw = self._fetch()
            row = find(self.raw)
            if row is None:
                raise traps.illegal_instruction()
            self.length = row.length
            row.function(self, *_operands(row, self.raw))
            state.pc = int(self.pc + self.length)
        except Done:
            pass
        except Left:
            if state.exit_kind == ExitKind.WFI:
                state.icount += 1
            return int(state.exit_kind)
        except Trap as trap:
            state.count_trap += 1
            self._enter(trap.cause, trap.tval)
            return int(ExitKind.NONE)
        state.icount += 1
        return int(ExitKind.NONE)

    def _enter(self, cause: int, tval: Value | int | None) -> None:
        try:
            traps.enter_trap(self, u64(cause), as_value(self.raw if tval is None else tval, 64))
        except Done:
            pass

    def interrupt(self) -> bool:
        """Take the interrupt that is due; whether there was one."""
        self.pc = u64(self._state.pc)
        cause = int(traps.pending_interrupt(self))
        if cause:
            self._state.count_trap += 1
            self._enter(cause, 0)
        return bool(cause)


def _operands(row: Insn, raw: int) -> list[Value]:
    return [operand.extract(const(32, raw)) for operand in row.operands]


def _result_width(operation: str) -> int:
    kind, _, name = operation.partition(".")
    if name in ("eq", "lt", "le"):
        return 1
    if name.startswith("to_"):
        return int(name[4:])
    return int(kind[1:])


_ACCESS_FAULTS = {
    "fetch": traps.INSTRUCTION_ACCESS_FAULT,
    "load": traps.LOAD_ACCESS_FAULT,
    "store": traps.STORE_ACCESS_FAULT,
}
_AMO: dict[str, Callable[[Value, Value], Value]] = {
    "swap": lambda old, new: new,
    "add": lambda old, new: old + new,
    "xor": lambda old, new: old ^ new,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "min": lambda old, new: old if old.slt(new) else new,
    "max": lambda old, new: new if old.slt(new) else old,
    "minu": lambda old, new: old if old < new else new,
    "maxu": lambda old, new: new if old < new else old,
}


def step(hart: Hart) -> int:
    """One instruction of a hart that is outside native code."""
    return ReferenceHart(hart).step()


def run(hart: Hart, instructions: int) -> int:
    """Up to `instructions` of them, interrupts taken; the ExitKind that ended it, NONE when they are done."""
    reference = ReferenceHart(hart)
    for _ in range(instructions):
        reference.interrupt()
        kind = reference.step()
        if kind != ExitKind.NONE:
            return kind
    return int(ExitKind.NONE)
