"""The hart that semantics see while they are traced for native code (kvmcore/isa/hart.py's protocol).

`Code` is what all native code shares: fields, calls, memory by host address. `HandlerHart` is code that runs
between two instructions' records: entered and left by tail calls. `FunctionHart` is an ordinary function (a
page walk). Memory: the fast form of a handler looks in the TLB and, on a miss, tail-calls its slow twin,
which is the same semantics with a call for each access; so fast handlers have no stack frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from kvmcore.engine import hart_state, machine_state
from kvmcore.engine.exits import ExitKind
from kvmcore.engine.native_fp import FloatingPoint
from kvmcore.ir import value as value_module
from kvmcore.ir.trace import PathEnd, Tracer
from kvmcore.ir.value import Value, as_value, select, u64
from kvmcore.isa.traps import Trap

#: What a function's second result says.
OK, TRAPPED, EXITED = 0, 1, 2
PAGE_MASK = ~4095


def tracer() -> Tracer:
    """The trace being recorded."""
    active = value_module.active
    assert active is not None
    return active


def param(name: str) -> Value:
    """A parameter of the function being traced."""
    return tracer().pure("param", (), 64, (name,))


def load(address: Value, width: int = 64, kind: str = "plain", align: int | None = None) -> Value:
    """`width` bits at a host address."""
    return tracer().effect("load", (address,), width, (kind, align or width // 8))


def store(address: Value, value: Value, kind: str = "plain", align: int | None = None) -> None:
    tracer().effect("store", (address, value), 0, (kind, align or value.width // 8))


def atomic(operation: str, address: Value, value: Value) -> Value:
    """LLVM's atomicrmw: the old content."""
    return tracer().effect("atomicrmw", (address, value), value.width, (operation,))


def compare_exchange(address: Value, old: Value, new: Value) -> Value:
    """1-bit Value: whether `old` was there and `new` is now."""
    return tracer().effect("cmpxchg", (address, old, new), 1)


def syscall(number: int, *args: Value | int) -> Value:
    """The host kernel's answer; negative: an errno. x86-64 numbers."""
    words = [as_value(arg, 64) for arg in (number, *args)]
    return tracer().effect("syscall", [*words, *[u64(0)] * (7 - len(words))], 64)


def pause() -> None:
    """Inside a loop that waits for another thread."""
    tracer().effect("pause", ())


def call(function: str, *args: Value) -> tuple[Value, Value]:
    """Call a native function: its two results."""
    first = tracer().effect("call", args, 64, (function,))
    return first, tracer().effect("second", (first,), 64)


def returns(first: Value, second: Value | int = OK) -> NoReturn:
    """End a function's path."""
    tracer().effect("return", (first, as_value(second, 64)))
    raise PathEnd


class Registers:
    """32 registers in the hart's block."""

    def __init__(self, code: Code, name: str) -> None:
        self._code, self._name = code, name

    def __getitem__(self, number: Value | int) -> Value:
        if self._name == "x" and isinstance(number, int) and number == 0:
            return u64(0)
        return self._code.get_at(self._name, number)

    def __setitem__(self, number: Value | int, value: Value) -> None:
        self._code.set_at(self._name, number, value)


class Code:
    """What all native code can do. `s` is the address of the hart's block."""

    def __init__(self) -> None:
        self.s = param("p0") if isinstance(self, FunctionHart) else param("s")
        self.x = Registers(self, "x")
        self.f = Registers(self, "f")
        self._fp = FloatingPoint(self)

    # -- fields ----------------------------------------------------------------------------------------------
    def address(self, name: str, index: Value | int = 0) -> Value:
        """Host address of a field's element."""
        size = hart_state.BY_NAME[name].bits // 8
        base = self.s + hart_state.offset(name)
        if isinstance(index, int) or index.const is not None:
            return base + int(index) * size
        return base + index.zext(64) * size

    def get(self, name: str) -> Value:
        if name == "fflags":
            return self._fp.read_flags()
        return load(self.address(name), hart_state.BY_NAME[name].bits, "volatile" if name in _SHARED else "plain")

    def set(self, name: str, value: Value | int) -> None:
        field = as_value(value, hart_state.BY_NAME[name].bits)
        if name == "fflags":
            self._fp.write_flags(field)
            return
        store(self.address(name), field, "volatile" if name in _SHARED else "plain")
        if name == "frm":
            self._fp.write_rounding(field)

    def get_at(self, name: str, index: Value | int) -> Value:
        return load(self.address(name, index), hart_state.BY_NAME[name].bits)

    def set_at(self, name: str, index: Value | int, value: Value | int) -> None:
        store(self.address(name, index), as_value(value, hart_state.BY_NAME[name].bits))

    def atomic_or(self, name: str, value: Value | int, index: Value | int = 0) -> Value:
        return atomic("or", self.address(name, index), as_value(value, hart_state.BY_NAME[name].bits))

    def atomic_and(self, name: str, value: Value | int, index: Value | int = 0) -> Value:
        return atomic("and", self.address(name, index), as_value(value, hart_state.BY_NAME[name].bits))

    def machine(self, name: str) -> Value:
        """Host address of a field of the machine's block."""
        return self.get("machine") + machine_state.OFFSET[name]

    def time(self) -> Value:
        """Host ticks scaled to the guest's timebase."""
        ticks = tracer().effect("ticks", (), 64)
        product = ticks.zext(128) * load(self.machine("time_mult")).zext(128)
        return (product >> 52).trunc(64) + load(self.machine("time_base"))

    def enabled(self, extension: str) -> Value:
        return (self.get("extensions") >> hart_state.EXTENSIONS.index(extension)).trunc(1)

    def routine(self, function: Callable[[Any], Value]) -> Value:
        """A function of isa that stands in routines.FUNCTIONS under its name."""
        return call(function.__name__, self.s)[0]

    # -- physical memory -------------------------------------------------------------------------------------
    def load_physical(self, address: Value) -> Value:
        host, status = call("table_memory", self.s, address)
        if status != OK:
            self.no_page_table(host)
        return load(host, 64, "volatile")

    def cas_physical(self, address: Value, old: Value, new: Value) -> Value:
        host, status = call("find_memory", self.s, address, u64(1))
        if status != OK:
            self.no_page_table(host)
        return compare_exchange(host, old, new)

    def no_page_table(self, why: Value) -> NoReturn:
        """`why`: what find_memory gave."""
        raise NotImplementedError


#: Fields that other threads write.
_SHARED = frozenset({"sip", "limit", "attention"})


class FunctionHart(Code):
    """An ordinary native function; p0 is the hart's block, p1.. its arguments. A trap becomes its result."""

    access_fault = 0

    def no_page_table(self, why: Value) -> NoReturn:
        if why != 0:  # it has yet to come: leave, and walk again then
            returns(u64(0), EXITED)
        raise Trap(self.access_fault, param("p1"))

    def trap(self, trap: Trap) -> NoReturn:
        self.set("trap_cause", trap.cause)
        self.set("trap_value", trap.tval if trap.tval is not None else 0)
        returns(u64(0), TRAPPED)


class Atomics(Code):
    """LR, SC, AMO and FENCE on the host's atomic instructions, wherever the host address comes from."""

    def _exclusive(self, address: Value, size: int, write: bool) -> Value:
        """Host address of an aligned atomic access."""
        raise NotImplementedError

    def load_reserved(self, address: Value, size: int) -> Value:
        host = self._exclusive(address, size, False)
        value = load(host, 8 * size, "atomic")
        self.set("reservation_address", host)
        self.set("reservation_value", value.zext(64))
        self.set("reservation_valid", size)
        return value

    def store_conditional(self, address: Value, value: Value) -> Value:
        host = self._exclusive(address, value.width // 8, True)
        held = self.get("reservation_valid") == value.width // 8
        same = self.get("reservation_address") == host
        self.set("reservation_valid", 0)
        if held & same:
            old = self.get("reservation_value").trunc(value.width)
            return ~compare_exchange(host, old, value)
        return Value(1, 1)

    def amo(self, operation: str, address: Value, value: Value) -> Value:
        host = self._exclusive(address, value.width // 8, True)
        names = {"swap": "xchg", "maxu": "umax", "minu": "umin"}
        return atomic(names.get(operation, operation), host, value)

    def fence(self, pred: Value, succ: Value) -> None:
        """Only stores before loads can be reordered by an x86 host."""
        if ((pred & 5) != 0) & ((succ & 10) != 0):
            tracer().effect("fence", (), 0, ("seq_cst",))


class HandlerHart(Atomics):
    """Code of one instruction, or of a routine between instructions.

    memory: "fast" or "slow"; near: the instruction's branch stays in its page; at: where pc comes from when
    there is no record (a parameter's name).
    """

    def __init__(self, name: str, length: int = 4, memory: str = "fast", near: bool = True, at: str = "") -> None:
        super().__init__()
        self.name, self.length, self.memory, self.near = name, length, memory, near
        self.ip, self.ab, self.base = param("ip"), param("ab"), param("base")
        self.ic, self.tlb = param("ic"), param("tlb")
        self.a0, self.a1 = param("a0"), param("a1")
        self._at = at
        self._refetch = False

    @property
    def pc(self) -> Value:
        return param(self._at) if self._at else (self.ip - self.ab).sar(2)  # canonical: the top bits agree

    def instret(self) -> Value:
        return self.ic

    # -- going on --------------------------------------------------------------------------------------------
    def tail(self, handler: str, a0: Value | int = 0, a1: Value | int = 0, ic: Value | None = None) -> NoReturn:
        """Go to another handler with these registers."""
        words = (self.ip, self.s, self.ab, self.base, ic if ic is not None else self.ic, self.tlb)
        tracer().effect("tail", (*words, as_value(a0, 64), as_value(a1, 64)), 0, (handler,))
        raise PathEnd

    def dispatch(self, ip: Value, ab: Value, ic: Value) -> NoReturn:
        """Run the record at `ip`."""
        handler = self.base + load(ip, 32).zext(64)
        tracer().effect("tail", (ip, self.s, ab, self.base, ic, self.tlb, handler))
        raise PathEnd

    def enter_template(self, place: Value, a0: Value, gd: Value) -> NoReturn:
        """Run template code at `place`, relative to what records are relative to."""
        words = (self.ip, self.s, self.ab, self.base, self.ic, self.tlb, a0, a0, gd)
        tracer().effect("tail", (*words, self.base + place))
        raise PathEnd

    def go(self, target: Value, ic: Value) -> NoReturn:
        """Go on at any address."""
        entry = self.tlb + (((target >> 12) & (hart_state.FETCH_TLB_ENTRIES - 1)) << 4)
        if load(entry + hart_state.FETCH_TLB_OFFSET) == (target & PAGE_MASK):
            ab = load(entry + (hart_state.FETCH_TLB_OFFSET + 8))
            self.dispatch((target << 2) + ab, ab, ic)
        self.tail("fetch_miss", target, ic=ic)

    def finish(self) -> NoReturn:
        """The semantics returned: the next instruction."""
        if self._refetch:
            self.go(self.pc + self.length, self.ic + 1)
        self.dispatch(self.ip + 4 * self.length, self.ab, self.ic + 1)

    def branch(self, offset: Value) -> NoReturn:
        ic = self.ic + 1
        if ic >= self.get("limit"):
            self.tail("poll", self.pc + offset, ic=ic)
        if self.near:
            self.dispatch(self.ip + (offset << 2), self.ab, ic)
        self.go(self.pc + offset, ic)

    def jump(self, target: Value) -> NoReturn:
        ic = self.ic if self._at else self.ic + 1
        if ic >= self.get("limit"):
            self.tail("poll", target, ic=ic)
        self.go(target, ic)

    def check_interrupts(self, target: Value | None = None) -> NoReturn:
        """Not by poll: that begins a new slice, and code that often writes sstatus would be all the samples there are."""
        self.tail("interrupts", target if target is not None else self.pc + self.length, u64(0), ic=self.ic + 1)

    def exit(self, kind: str) -> NoReturn:
        self.set("exit_kind", int(ExitKind[kind]))
        if kind == "CSR":
            self.tail("leave_access", self.pc)
        if kind == "WFI":  # it has waited; an interrupt's sepc is the next instruction
            self.tail("leave", self.pc + self.length, ic=self.ic + 1)
        self.tail("leave", self.pc)

    def trap(self, trap: Trap) -> NoReturn:
        self.set("trap_cause", trap.cause)
        if trap.tval is None:
            self.tail("trap_instruction", self.pc)
        self.set("trap_value", trap.tval)
        self.tail("take_trap", self.pc)

    def failed(self, status: Value) -> NoReturn:
        """A function said TRAPPED or EXITED."""
        if status == TRAPPED:
            self.tail("take_trap", self.pc)
        self.tail("leave_access", self.pc)

    # -- virtual memory --------------------------------------------------------------------------------------
    def _host(self, address: Value, size: int, write: bool) -> Value:
        """Host address by the TLB; a miss ends the path in the slow twin."""
        entry = self.tlb + ((address >> 7) & ((hart_state.DATA_TLB_ENTRIES - 1) << 5))
        tag = load(entry + (8 if write else 0))
        last = address + (size - 1) if size > 1 else address
        if (last & PAGE_MASK) != tag:
            self.miss(address, write)
        return address + load(entry + 16)

    def miss(self, address: Value, write: bool) -> NoReturn:
        """The TLB does not have an address."""
        self.tail(self.name + ".slow")

    def load(self, address: Value, size: int) -> Value:
        if self.memory == "fast":
            return load(self._host(address, size, False), 8 * size, "volatile", 1)
        value, status = call(f"slow_load_{size}", self.s, address)
        if status != OK:
            self.failed(status)
        return value.trunc(8 * size)

    def store(self, address: Value, value: Value) -> None:
        size = value.width // 8
        if self.memory == "fast":
            store(self._host(address, size, True), value, "volatile", 1)
            return
        _, status = call(f"slow_store_{size}", self.s, address, value.zext(64))
        if status != OK:
            self.failed(status)

    def _exclusive(self, address: Value, size: int, write: bool) -> Value:
        """Host address of an aligned atomic access."""
        if self.memory == "fast":
            return self._host(address, size, write)
        host, status = call("atomic_address", self.s, address, u64(int(write)))
        if status != OK:
            self.failed(status)
        return host

    def zero_block(self, address: Value, size: int) -> None:
        host = self._exclusive(address, 1, True) & -size
        for offset in range(0, size, 8):
            store(host + offset, u64(0), "volatile", 8)

    def check_block(self, address: Value) -> None:
        _, status = call("check_block", self.s, address)
        if status != OK:
            self.failed(status)

    def pause(self) -> None:
        call("relax", self.s, self.ic)

    def fence_i(self) -> None:
        call("flush_fetch", self.s)
        self._refetch = True

    def sfence_vma(self, address: Value | None, asid: Value | None) -> None:
        if address is None:
            if asid is None:
                call("flush_tlb", self.s)
            else:
                call("flush_asid", self.s, asid)
            # Teaching kernels load programs and switch to them without a fence.i, which works on harts whose
            # fetch is coherent. They do not use ASIDs; so only then it costs a comparison of decoded pages.
            if (self.get("satp") & (0xFFFF << 44)) == 0:
                call("flush_fetch", self.s)
        else:
            call("flush_page", self.s, address)
        self._refetch = True

    def context_changed(self) -> None:
        self.tlb, _ = call("choose_tlb", self.s)
        self._refetch = True

    def fp(self, operation: str, args: tuple[Value, ...], rm: Value | int | None = None) -> Value:
        return self._fp.operation(self, operation, args, rm)


__all__ = ["Code", "FunctionHart", "HandlerHart", "call", "load", "param", "returns", "select", "store"]
