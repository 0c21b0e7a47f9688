"""The hart that records: isa's semantics run on it once, and what they ask for becomes operations of a trace.

Implements kvmcore.isa.hart.Hart over a Tracer. Called by interpreter.py for each instruction and for the routines
(walk, trap entry, interrupt check). What each effect means natively is lowering.py's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from kvmcore.engine import hart_state
from kvmcore.ir.trace import Block, PathEnd, Tracer
from kvmcore.ir.value import Value, as_value, const
from kvmcore.isa.hart import Reg
from kvmcore.isa.paging import Retry
from kvmcore.isa.traps import Trap


class TracedRegisters:
    """x[] or f[]: reads and writes by number, known or not."""

    def __init__(self, tracer: Tracer, name: str) -> None:
        self._tracer, self._name = tracer, name

    def __getitem__(self, number: Reg) -> Value:
        index = as_value(number, 8)
        if self._name == "x" and index.const == 0:
            return const(64, 0)
        return self._tracer.effect("get_" + self._name, (index,), 64)

    def __setitem__(self, number: Reg, value: Value) -> None:
        self._tracer.effect("set_" + self._name, (as_value(number, 8), as_value(value, 64)))


class TracedHart:
    """Records effects; every method that ends the path raises PathEnd."""

    def __init__(self, tracer: Tracer, length: int = 4) -> None:
        self._tracer = tracer
        self._length = length
        self._x, self._f = TracedRegisters(tracer, "x"), TracedRegisters(tracer, "f")

    @property
    def x(self) -> TracedRegisters:
        return self._x

    @property
    def f(self) -> TracedRegisters:
        return self._f

    @property
    def pc(self) -> Value:
        return self._tracer.pure("pc", (), 64)

    @property
    def length(self) -> int:
        return self._length

    def _effect(self, opcode: str, *args: Value, width: int = 0, attrs: tuple[object, ...] = ()) -> Value:
        return self._tracer.effect(opcode, args, width, attrs)

    def _end(self, opcode: str, *args: Value, attrs: tuple[object, ...] = ()) -> NoReturn:
        self._tracer.effect(opcode, args, 0, attrs)
        raise PathEnd

    # -- state -----------------------------------------------------------------------------------------------------
    def get(self, name: str) -> Value:
        return self._effect("get", width=hart_state.BY_NAME[name].bits, attrs=(name,))

    def set(self, name: str, value: Value | int) -> None:
        self._effect("set", as_value(value, hart_state.BY_NAME[name].bits), attrs=(name,))

    def get_at(self, name: str, index: Value | int) -> Value:
        return self._effect("get_at", as_value(index, 64), width=hart_state.BY_NAME[name].bits, attrs=(name,))

    def set_at(self, name: str, index: Value | int, value: Value | int) -> None:
        bits = hart_state.BY_NAME[name].bits
        self._effect("set_at", as_value(index, 64), as_value(value, bits), attrs=(name,))

    def atomic_or(self, name: str, value: Value | int, index: Value | int = 0) -> Value:
        return self._atomic("or", name, value, index)

    def atomic_and(self, name: str, value: Value | int, index: Value | int = 0) -> Value:
        return self._atomic("and", name, value, index)

    def _atomic(self, operation: str, name: str, value: Value | int, index: Value | int) -> Value:
        bits = hart_state.BY_NAME[name].bits
        args = (as_value(index, 64), as_value(value, bits))
        return self._effect("atomic_field", *args, width=bits, attrs=(operation, name))

    # -- the end of the path ---------------------------------------------------------------------------------------
    def branch(self, offset: Value) -> NoReturn:
        self._end("branch", offset)

    def jump(self, target: Value) -> NoReturn:
        self._end("jump", target)

    def check_interrupts(self, target: Value | None = None) -> NoReturn:
        self._end("check_interrupts", *(() if target is None else (target,)))

    def exit(self, kind: str) -> NoReturn:
        self._end("exit", attrs=(kind,))

    # -- memory ----------------------------------------------------------------------------------------------------
    def load(self, address: Value, size: int) -> Value:
        return self._effect("load", address, width=8 * size)

    def store(self, address: Value, value: Value) -> None:
        self._effect("store", address, value)

    def load_reserved(self, address: Value, size: int) -> Value:
        return self._effect("load_reserved", address, width=8 * size)

    def store_conditional(self, address: Value, value: Value) -> Value:
        return self._effect("store_conditional", address, value, width=1)

    def amo(self, operation: str, address: Value, value: Value) -> Value:
        return self._effect("amo", address, value, width=value.width, attrs=(operation,))

    def zero_block(self, address: Value, size: int) -> None:
        self._effect("zero_block", address, attrs=(size,))

    def check_block(self, address: Value) -> None:
        self._effect("check_block", address)

    def fence(self, pred: Value, succ: Value) -> None:
        self._effect("fence", pred, succ)

    def fence_i(self) -> None:
        self._effect("fence_i")

    def sfence_vma(self, address: Value | None, asid: Value | None) -> None:
        args = [value for value in (address, asid) if value is not None]
        self._effect("sfence_vma", *args, attrs=(address is not None, asid is not None))

    def context_changed(self) -> None:
        self._effect("context_changed")

    def load_physical(self, address: Value) -> Value:
        return self._effect("load_physical", address, width=64)

    def cas_physical(self, address: Value, old: Value, new: Value) -> Value:
        return self._effect("cas_physical", address, old, new, width=1)

    # -- arithmetic and time ---------------------------------------------------------------------------------------
    def fp(self, operation: str, args: tuple[Value, ...], rm: Value | int | None = None) -> Value:
        from kvmcore.engine.floating_point import result_width

        rounding = () if rm is None else (as_value(rm, 8),)
        return self._effect("fp", *args, *rounding, width=result_width(operation), attrs=(operation, rm is not None))

    def time(self) -> Value:
        return self._effect("time", width=64)

    def instret(self) -> Value:
        return self._effect("instret", width=64)


def trace(body: Callable[[TracedHart], tuple[Value, ...] | None], length: int = 4) -> Block:
    """The tree of `body`'s paths. A path that returns ends with "next" and the returned Values as arguments."""
    tracer = Tracer()
    hart = TracedHart(tracer, length)

    def run() -> None:
        try:
            results = body(hart) or ()
        except Trap as trap:
            cause = as_value(trap.cause, 64)
            tval = () if trap.tval is None else (as_value(trap.tval, 64),)
            tracer.effect("trap", (cause, *tval))
        except Retry:
            tracer.effect("retry", ())
        else:
            tracer.effect("next", results)

    return tracer.trace(run)
