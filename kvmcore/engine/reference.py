"""The reference: semantics on known Values, one instruction at a time, over the same state as native code.

Used for tests, for `--accel reference`, and for the rare instruction that native code hands over (EMULATE).
Slow. Harts in the reference are atomic among themselves, not against harts in native code.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from errno import EFAULT, EIO, EOPNOTSUPP
from typing import TYPE_CHECKING, Any, NoReturn

from kvmcore.engine import hart_state, machine_state
from kvmcore.engine.exits import ExitKind
from kvmcore.ir.value import Value, as_value, const, u64
from kvmcore.isa import csrs, paging, softfloat, traps
from kvmcore.isa.describe import Insn
from kvmcore.isa.table import find
from kvmcore.isa.traps import Trap

if TYPE_CHECKING:
    from kvmcore.engine.machine import Hart

U64 = (1 << 64) - 1
_PAGE = 4096
#: Translations and decoded instructions that are remembered before all are forgotten.
_CACHE = 4096
_memory = threading.Lock()


class Done(Exception):
    """The instruction is finished and has set pc itself."""


class Left(Exception):
    """The instruction left with exit_kind; pc is where ExitKind says."""


class _Registers:
    """x or f of a hart's block."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __getitem__(self, number: Value | int) -> Value:
        return Value(64, self._array[int(number)])

    def __setitem__(self, number: Value | int, value: Value) -> None:
        self._array[int(number)] = int(as_value(value, 64))


class _Decoded:
    """An instruction word that has been looked up: its row and what the function is called with."""

    __slots__ = ("arguments", "function", "length")

    def __init__(self, row: Insn, raw: int) -> None:
        self.function, self.length = row.function, row.length
        self.arguments = [o.decode(raw) if o.is_register else const(o.width, o.decode(raw)) for o in row.operands]


class ReferenceHart:
    """kvmcore/isa/hart.py's protocol over a hart's block; one object for any number of instructions.

    Translations are remembered until a fence, as a TLB does; `forget` drops them.
    """

    def __init__(self, hart: Hart) -> None:
        self._hart = hart
        self._state = hart.state
        self.x = _Registers(hart.state.x)
        self.f = _Registers(hart.state.f)
        self.pc = u64(0)
        self.length = 4
        self.raw = 0
        self._decoded: dict[int, _Decoded] = {}
        self._pages: dict[tuple[object, ...], int] = {}

    def forget(self) -> None:
        """Drop all remembered translations."""
        self._pages.clear()

    # -- state -----------------------------------------------------------------------------------------
    def get(self, name: str) -> Value:
        return Value(hart_state.BY_NAME[name].bits, getattr(self._state, name))

    def set(self, name: str, value: Value | int) -> None:
        setattr(self._state, name, int(as_value(value, hart_state.BY_NAME[name].bits)))

    def get_at(self, name: str, index: Value | int) -> Value:
        return Value(hart_state.BY_NAME[name].bits, getattr(self._state, name)[int(index)])

    def set_at(self, name: str, index: Value | int, value: Value | int) -> None:
        getattr(self._state, name)[int(index)] = int(as_value(value, hart_state.BY_NAME[name].bits))

    def _field_address(self, name: str, index: Value | int) -> int:
        size = hart_state.BY_NAME[name].bits // 8
        return ctypes.addressof(self._state) + hart_state.offset(name) + size * int(index)

    def atomic_or(self, name: str, value: Value | int, index: Value | int = 0) -> Value:
        address = self._field_address(name, index)
        return u64(self._hart.machine.image.atomic_or(address, int(as_value(value, 64))))

    def atomic_and(self, name: str, value: Value | int, index: Value | int = 0) -> Value:
        address = self._field_address(name, index)
        return u64(self._hart.machine.image.atomic_and(address, int(as_value(value, 64))))

    def routine(self, function: Callable[[Any], Value]) -> Value:
        return function(self)

    def enabled(self, extension: str) -> Value:
        return const(1, self._state.extensions >> hart_state.EXTENSIONS.index(extension))

    # -- the end of an instruction ---------------------------------------------------------------------
    def _go(self, target: Value) -> NoReturn:
        self._state.pc = int(target)
        raise Done

    def branch(self, offset: Value) -> NoReturn:
        self._go(self.pc + offset)

    def jump(self, target: Value) -> NoReturn:
        self._go(target)

    def check_interrupts(self, target: Value | None = None) -> NoReturn:
        """`run` looks before every instruction anyway."""
        self._go(target if target is not None else self.pc + self.length)

    def exit(self, kind: str) -> NoReturn:
        self._state.exit_kind = ExitKind[kind]
        self._state.exit_insn = self.raw
        if kind == "WFI":
            self._state.pc = int(self.pc + self.length)
        raise Left

    def _fail(self, errno: int) -> NoReturn:
        self._state.exit_errno = errno
        self.exit("ERROR")

    # -- guest memory ----------------------------------------------------------------------------------
    def _slot(self, gpa: int) -> machine_state.Slot | None:
        machine = self._hart.machine.state
        slots = ctypes.cast(int(machine.slots), ctypes.POINTER(machine_state.Slot))
        for index in range(machine.slot_count):
            slot: machine_state.Slot = slots[index]
            if slot.start <= gpa < slot.end:
                return slot
        return None

    def _translate(self, va: Value, access: str) -> int:
        state, address = self._state, int(va)
        key = (access, address >> 12, state.mode, state.sum, state.mxr, state.satp)
        page = self._pages.get(key)
        if page is None:
            self._walk_fault, self._walk_va = _ACCESS_FAULTS[access], address
            while True:
                try:
                    page = int(paging.translate(self, va, access)[0]) & -_PAGE
                    break
                except paging.Retry:
                    continue
            if len(self._pages) >= _CACHE:
                self._pages.clear()
            self._pages[key] = page
        return page | address & (_PAGE - 1)

    def _present(self, slot: machine_state.Slot, gpa: int) -> None:
        """Leave when the page has yet to come."""
        if slot.userfault:
            page = (gpa - slot.start) >> 12
            if ctypes.c_uint64.from_address(slot.userfault + 8 * (page >> 6)).value >> (page & 63) & 1:
                self._state.exit_gpa = gpa
                self.exit("PAGE_ABSENT")

    def _dirty(self, slot: machine_state.Slot, gpa: int) -> None:
        """Note a write in the dirty log, or leave when no more pages may become dirty."""
        if slot.dirty:
            page = (gpa - slot.start) >> 12
            word, bit = slot.dirty + 8 * (page >> 6), 1 << (page & 63)
            if not ctypes.c_uint64.from_address(word).value & bit:
                budget = ctypes.c_int64(self._state.dirty_budget).value
                if budget < 1:
                    self.exit("DIRTY_BUDGET")
                self._hart.machine.image.atomic_or(word, bit)
                self._state.dirty_budget = (budget - 1) & U64

    def _host(self, address: Value, size: int, access: str, data: int = 0) -> int:
        """Host address of an access inside one page; leaves where there is no memory."""
        gpa = self._translate(address, access)
        slot = self._slot(gpa)
        state = self._state
        state.exit_gpa, state.exit_va, state.exit_len = gpa, int(address), size
        if slot is not None and slot.flags & machine_state.SLOT_ABSENT:
            self._fail(EFAULT)
        if slot is None or (access == "store" and slot.flags & machine_state.SLOT_READONLY):
            state.exit_data = data
            self.exit("MMIO_WRITE" if access == "store" else "MMIO_READ")
        self._present(slot, gpa)
        if access == "store":
            self._dirty(slot, gpa)
        return int((gpa + slot.delta) & U64)

    def _hosts(self, address: Value, size: int, access: str, data: int = 0) -> list[tuple[int, int]]:
        """(host address, bytes) of the one or two pages that an access lies in; devices only in one."""
        room = _PAGE - int(address) % _PAGE
        if size <= room:
            return [(self._host(address, size, access, data), size)]
        try:
            first = self._host(address, room, access, data)
            return [(first, room), (self._host(address + room, size - room, access, data), size - room)]
        except Left:
            self._no_device(EIO)
            raise

    def _no_device(self, errno: int) -> None:
        """The access has left; if to a device, it is one that devices do not take."""
        if self._state.exit_kind in (ExitKind.MMIO_READ, ExitKind.MMIO_WRITE):
            self._state.exit_kind, self._state.exit_errno = ExitKind.ERROR, errno

    def load(self, address: Value, size: int) -> Value:
        hosts = self._hosts(address, size, "load")
        data = b"".join(ctypes.string_at(host, length) for host, length in hosts)
        return const(8 * size, int.from_bytes(data, "little"))

    def store(self, address: Value, value: Value) -> None:
        size = value.width // 8
        data = int(value).to_bytes(size, "little")
        done = 0
        hosts = self._hosts(address, size, "store", int(value))
        with _memory:
            for host, length in hosts:
                ctypes.memmove(host, data[done : done + length], length)
                done += length

    def _exclusive(self, address: Value, size: int, access: str) -> int:
        try:
            return self._host(address, size, access)
        except Left:
            self._no_device(EOPNOTSUPP)
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
        with _memory:
            if not held or int.from_bytes(ctypes.string_at(host, size), "little") != state.reservation_value:
                return const(1, 1)
            ctypes.memmove(host, int(value).to_bytes(size, "little"), size)
        return const(1, 0)

    def amo(self, operation: str, address: Value, value: Value) -> Value:
        size = value.width // 8
        host = self._exclusive(address, size, "store")
        with _memory:
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

    # -- physical memory, for walks ---------------------------------------------------------------------
    _walk_fault, _walk_va = traps.LOAD_ACCESS_FAULT, 0

    def _table(self, address: Value, refused: int) -> tuple[machine_state.Slot, int]:
        slot = self._slot(int(address))
        if slot is None or slot.flags & refused:
            raise Trap(self._walk_fault, self._walk_va)
        self._present(slot, int(address))
        return slot, (int(address) + slot.delta) & U64

    def load_physical(self, address: Value) -> Value:
        _, host = self._table(address, machine_state.SLOT_ABSENT)
        return u64(int.from_bytes(ctypes.string_at(host, 8), "little"))

    def cas_physical(self, address: Value, old: Value, new: Value) -> Value:
        slot, host = self._table(address, machine_state.SLOT_ABSENT | machine_state.SLOT_READONLY)
        self._dirty(slot, int(address))
        with _memory:
            if int.from_bytes(ctypes.string_at(host, 8), "little") != int(old):
                return const(1, 0)
            ctypes.memmove(host, int(new).to_bytes(8, "little"), 8)
        return const(1, 1)

    # -- fences -----------------------------------------------------------------------------------------
    def fence(self, pred: Value, succ: Value) -> None:
        pass

    def pause(self) -> None:
        pass

    def fence_i(self) -> None:
        self._hart.flush_icache()  # native code may run next

    def sfence_vma(self, address: Value | None, asid: Value | None) -> None:
        self.forget()
        self._hart.flush_tlb()

    def context_changed(self) -> None:
        pass  # translations are remembered with the context that they belong to

    # -- arithmetic and time ----------------------------------------------------------------------------
    def fp(self, operation: str, args: tuple[Value, ...], rm: Value | int | None = None) -> Value:
        mode = softfloat.RNE if rm is None else int(rm)
        if mode == softfloat.DYNAMIC:
            mode = self._state.frm
        bits, flags = softfloat.evaluate(operation, tuple(int(arg) for arg in args), mode)
        self._state.fflags |= flags
        return const(softfloat.result_width(operation), bits)

    def time(self) -> Value:
        return u64(self._hart.machine.time())

    def instret(self) -> Value:
        return u64(self._state.icount)

    # -- one instruction --------------------------------------------------------------------------------
    def _fetch(self) -> int:
        address = int(self.pc)
        if address & (_PAGE - 1) > _PAGE - 4:
            low = self._fetch_bytes(self.pc, 2)
            return low if low & 3 != 3 else low | self._fetch_bytes(self.pc + 2, 2) << 16
        raw = self._fetch_bytes(self.pc, 4)
        return raw if raw & 3 == 3 else raw & 0xFFFF

    def _fetch_bytes(self, va: Value, size: int) -> int:
        slot = self._slot(gpa := self._translate(va, "fetch"))
        if slot is None or slot.flags & machine_state.SLOT_ABSENT:
            raise Trap(traps.INSTRUCTION_ACCESS_FAULT, va)
        self._present(slot, gpa)
        return int.from_bytes(ctypes.string_at((gpa + slot.delta) & U64, size), "little")

    def _decode(self, raw: int) -> _Decoded:
        row = find(raw)
        if row is None:
            raise traps.illegal_instruction()
        if len(self._decoded) >= _CACHE:
            self._decoded.clear()
        self._decoded[raw] = decoded = _Decoded(row, raw)
        return decoded

    def step(self) -> int:
        """Execute the instruction at pc, its traps included; the ExitKind if it left, else NONE."""
        state = self._state
        self.pc, self.raw = Value(64, state.pc), 0
        try:
            self.raw = raw = self._fetch()
            decoded = self._decoded.get(raw) or self._decode(raw)
            self.length = decoded.length
            decoded.function(self, *decoded.arguments)
            state.pc = (int(self.pc) + decoded.length) & U64
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
        state = self._state
        if not state.sie or (state.mode and not state.sstatus_sie):
            return False
        self.pc = u64(state.pc)
        cause = int(traps.pending_interrupt(self))
        if cause:
            state.count_trap += 1
            self._enter(cause, 0)
        return bool(cause)


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
    """One instruction of a hart that is outside native code; its ExitKind or NONE."""
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


def read_csr(hart: Hart, name: str) -> int:
    """A CSR of a hart that is not running, as the guest in S-mode reads it. KeyError: no such name."""
    return int(csrs.BY_NAME[name].read(ReferenceHart(hart)))


def write_csr(hart: Hart, name: str, value: int) -> None:
    """Write it as the guest in S-mode would. KeyError: no such name; ValueError: read-only."""
    csr, reference = csrs.BY_NAME[name], ReferenceHart(hart)
    if csr.change is not None:
        csr.change(reference, u64(value), u64(U64))
    elif csr.write is not None:
        csr.write(reference, u64(value))
    else:
        raise ValueError(f"{name} is read-only")
