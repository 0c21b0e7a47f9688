"""The hart that semantics see while they are traced for a region: registers are variables of the function.

Operands are known, so every trace is small. Effects that only a region has are recorded under names of their
own, which region_code.py turns into LLVM IR: getreg, setreg, gload, gstore, ghost (host address of an atomic),
pc, fpready, goto, jump, next, and aside: leave the region and let the interpreter do this instruction from its beginning.
"""

from __future__ import annotations

from typing import NoReturn

from kvmcore.engine.native_hart import Atomics, tracer
from kvmcore.engine.regions import Step
from kvmcore.ir.trace import Block, PathEnd, Tracer
from kvmcore.ir.value import Value, u64
from kvmcore.isa.describe import X0_SINK
from kvmcore.isa.traps import Trap


class RegionRegisters:
    """x or f; numbers are known."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, number: Value | int) -> Value:
        if self._name == "x" and int(number) == 0:
            return u64(0)
        return tracer().effect("getreg", (), 64, (f"{self._name}{int(number)}",))

    def __setitem__(self, number: Value | int, value: Value) -> None:
        if self._name == "x" and int(number) in (0, X0_SINK):
            return
        tracer().effect("setreg", (value,), 0, (f"{self._name}{int(number)}",))


class RegionHart(Atomics):
    """One instruction of a region."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.x = RegionRegisters("x")  # type: ignore[assignment]
        self.f = RegionRegisters("f")  # type: ignore[assignment]

    @property
    def pc(self) -> Value:
        return tracer().pure("pc", (), 64)

    def get(self, name: str) -> Value:
        """Floating point begins with fpready: then FS is dirty already, and the host rounds as frm says."""
        if name in ("fs", "frm"):
            tracer().effect("fpready", ())
            return Value(8, 3) if name == "fs" else super().get(name) & 3
        return super().get(name)

    def set(self, name: str, value: Value | int) -> None:
        if name == "fs" and int(value) == 3:
            tracer().effect("fpready", ())
        else:
            super().set(name, value)

    def _end(self, opcode: str, args: tuple[Value, ...] = (), attrs: tuple[object, ...] = ()) -> NoReturn:
        tracer().effect(opcode, args, 0, attrs)
        raise PathEnd

    def branch(self, offset: Value) -> NoReturn:
        self._end("goto", (), (offset.signed,))

    def jump(self, target: Value) -> NoReturn:
        self._end("jump", (target,))

    def finish(self) -> NoReturn:
        self._end("next")

    def exit(self, kind: str) -> NoReturn:
        self._end("aside")

    def pause(self) -> None:
        self._end("aside")

    # -- virtual memory --------------------------------------------------------------------------------------
    def load(self, address: Value, size: int) -> Value:
        return tracer().effect("gload", (address,), 8 * size)

    def store(self, address: Value, value: Value) -> None:
        tracer().effect("gstore", (address, value))

    def _exclusive(self, address: Value, size: int, write: bool) -> Value:
        return tracer().effect("ghost", (address,), 64, (size, write))

    def fp(self, operation: str, args: tuple[Value, ...], rm: Value | int | None = None) -> Value:
        return self._fp.operation(self, operation, args, rm)


def trace(step: Step, prefix: str) -> list[Block]:
    """The instruction's blocks, the first one first; names of results begin with `prefix`."""
    recorder = Tracer(prefix=prefix)

    def body() -> None:
        h = RegionHart(step.row.length)
        try:
            step.row.function(h, *(_known(step, operand.name, operand.width) for operand in step.row.operands))
            h.finish()
        except Trap:
            h.exit("TRAP")

    recorder.trace(body)
    return recorder.blocks


def _known(step: Step, name: str, width: int) -> Value:
    return Value(width, step.operands[name])
