"""What every piece of the engine's native code has in common: the handlers' signature, access to the hart's state.

`Native` is ir.code.Code with the fields of HartState and MachineState by name. Used by the runtime parts (softmmu,
code_pages, runtime); lowering.py shares the constants.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvmcore.engine import hart_state, layout
from kvmcore.ir.code import Code, Expr, Operand

CONVENTION = "preserve_nonecc"
PARAMETERS = ("s", "ip", "abase", "base", "icount", "tlb", "rec")
"""Of every handler, all 64 bits: HartState; the record; pc = (ip - abase) >> 2; the image; instructions retired; the
TLB block; the record's content (operands in the low half, the handler's offset in the high half)."""
SIGNATURE = ", ".join(f"i64 %{name}" for name in PARAMETERS)

OK, TRAP, EXIT = 0, 1, 2
"""Status of a helper: done; an exception (trap_cause, trap_value); leave native code (exit_kind)."""


def arguments(**changed: str) -> str:
    """The argument list of a tail call: the parameters, some of them replaced."""
    return ", ".join(f"i64 {changed.get(name, '%' + name)}" for name in PARAMETERS)


class Native(Code):
    """A function with access to the hart's state; its first parameter is `s`, the HartState's address."""

    def __init__(
        self, name: str, parameters: Sequence[str | tuple[str, int]], returns: int = 0, linkage: str = "internal",
        convention: str = "", attributes: str = "#0",
    ) -> None:  # fmt: skip
        listed = [p if isinstance(p, tuple) else (p, 64) for p in parameters]
        super().__init__(name, listed, returns, linkage, attributes, convention)
        self.s = self.parameters[0]

    def field(self, name: str) -> tuple[int, int]:
        return hart_state.offset(name), hart_state.BY_NAME[name].bits

    def get(self, name: str, volatile: bool = False) -> Expr:
        offset, bits = self.field(name)
        return self.load(self.s, offset, bits, volatile)

    def set(self, name: str, value: Operand, volatile: bool = False) -> None:
        offset, bits = self.field(name)
        self.store(self.s, value, offset, bits, volatile)

    def count(self, name: str) -> None:
        """One more of a counter."""
        self.set(name, self.get(name) + 1)

    def machine(self) -> Expr:
        return self.get("machine")

    def machine_get(self, machine: Expr, name: str) -> Expr:
        offset, bits = layout.machine_offset(name)
        return self.load(machine, offset, bits)

    def machine_set(self, machine: Expr, name: str, value: Operand) -> None:
        offset, bits = layout.machine_offset(name)
        self.store(machine, value, offset, bits)


class Handler(Native):
    """A function with the handlers' signature; ends by jumping to another one, or by leaving native code."""

    def __init__(self, name: str, attributes: str = "#0") -> None:
        super().__init__(name, PARAMETERS, 0, "internal", CONVENTION, attributes)
        self.ip, self.abase, self.base, self.icount, self.tlb, self.rec = self.parameters[1:]

    def pc(self) -> Expr:
        return (self.ip - self.abase).sar(2)

    def jump(self, target: str, **changed: Operand) -> None:
        """Continue in another handler, with some parameters replaced."""
        self.tail(target, *(changed.get(name, getattr(self, name)) for name in PARAMETERS))

    def dispatch(self, **changed: Operand) -> None:
        """Execute the record at `ip`."""
        ip = changed.get("ip", self.ip)
        assert isinstance(ip, Expr)
        record = self.load(ip, volatile=True)
        target = self.pointer(self.base + (record >> 32))
        self.jump(target, **{**changed, "rec": record})
