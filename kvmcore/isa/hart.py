"""What a semantics function may ask of the hart it runs on: the seam between isa and the engines.

Two implementations: the reference (kvmcore/engine/reference.py), where all Values are known, and the traced
hart of the native engine, where each call records an operation. Semantics never see memory, locks or time in
another way. All Values are 64 bits wide unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from kvmcore.ir.value import Value

#: A register number: known in the reference, an operand of the record in native code.
Reg = Value | int


class Registers(Protocol):
    """32 registers of 64 bits. x[0] reads 0; writes go to operands of kind "xd", which never are 0."""

    def __getitem__(self, number: Reg) -> Value: ...

    def __setitem__(self, number: Reg, value: Value) -> None: ...


class Hart(Protocol):
    """One hart, during one instruction (or one trap entry, one page walk)."""

    @property
    def x(self) -> Registers:
        """Integer registers."""

    @property
    def f(self) -> Registers:
        """Floating-point registers, singles NaN-boxed."""

    @property
    def pc(self) -> Value:
        """Address of this instruction."""

    @property
    def length(self) -> int:
        """Bytes of this instruction: 2 or 4."""

    # -- state: fields of kvmcore/engine/hart_state.py, each with its own width --------------------
    def get(self, name: str) -> Value: ...

    def set(self, name: str, value: Value | int) -> None: ...

    def get_at(self, name: str, index: Value | int) -> Value:
        """Element of an array field."""

    def set_at(self, name: str, index: Value | int, value: Value | int) -> None: ...

    def atomic_or(self, name: str, value: Value | int, index: Value | int = 0) -> Value:
        """Set bits in a field (element `index` of an array) that other threads write; the old content."""

    def atomic_and(self, name: str, value: Value | int, index: Value | int = 0) -> Value:
        """Clear bits in a field that other threads write; the old content. A full barrier, as atomic_or."""

    def routine(self, function: Callable[[Any], Value]) -> Value:
        """function(self): in native code compiled once, out of line, and called. It may not end the path."""

    def enabled(self, extension: str) -> Value:
        """1-bit: whether this hart has an extension that can be switched off ("zicbom")."""

    # -- the end of the path -----------------------------------------------------------------------
    # Returning from the function means: go on with the next instruction. raise Trap(...) ends the path too.
    def branch(self, offset: Value) -> NoReturn:
        """Go on at pc + offset, the instruction's own immediate."""

    def jump(self, target: Value) -> NoReturn:
        """Go on at an address that is not known when the instruction is decoded; bit 0 is clear."""

    def check_interrupts(self, target: Value | None = None) -> NoReturn:
        """Go on at `target` (default: the next instruction) after taking whatever interrupt is now due."""

    def exit(self, kind: str) -> NoReturn:
        """Leave native code with pc at this instruction: "ECALL", "WFI", "CSR", "EBREAK" or "EMULATE"."""

    # -- memory, virtual addresses -----------------------------------------------------------------
    def load(self, address: Value, size: int) -> Value:
        """`size` bytes as a Value of 8 * size bits; misaligned is allowed. May end the path (trap, MMIO)."""

    def store(self, address: Value, value: Value) -> None:
        """Store all bits of `value`; misaligned is allowed. May end the path (trap, MMIO)."""

    def load_reserved(self, address: Value, size: int) -> Value:
        """LR: load and reserve; 8 * size bits. The address is aligned."""

    def store_conditional(self, address: Value, value: Value) -> Value:
        """SC: 1-bit Value, 1 = failed. The reservation is gone afterwards. The address is aligned."""

    def amo(self, operation: str, address: Value, value: Value) -> Value:
        """Atomic swap add xor and or min max minu maxu; the old content, of value's width. Aligned."""

    def zero_block(self, address: Value, size: int) -> None:
        """Store `size` zero bytes at the address rounded down to a multiple of `size` (cbo.zero)."""

    def check_block(self, address: Value) -> None:
        """The check of cbo.inval, clean, flush: trap as a store unless load or store is allowed."""

    def fence(self, pred: Value, succ: Value) -> None:
        """Order memory accesses; bits of 8-bit pred and succ: 1 write, 2 read, 4 output, 8 input."""

    def pause(self) -> None:
        """A hint, and nothing else: the hart waits for another one, or for a device."""

    def fence_i(self) -> None:
        """Later fetches of this hart see earlier stores."""

    def sfence_vma(self, address: Value | None, asid: Value | None) -> None:
        """Forget translations: of one page or all, of one address space (global ones excepted) or all."""

    def context_changed(self) -> None:
        """Mode, satp, SUM or MXR may have changed: translations are chosen anew for the next access."""

    # -- physical memory, for page walks -----------------------------------------------------------
    def load_physical(self, address: Value) -> Value:
        """The 8 aligned bytes at a guest-physical address; no memory there: access fault of the walk."""

    def cas_physical(self, address: Value, old: Value, new: Value) -> Value:
        """Compare and swap 8 bytes of guest-physical memory; 1-bit Value, 1 = swapped."""

    # -- arithmetic and time -----------------------------------------------------------------------
    def fp(self, operation: str, args: tuple[Value, ...], rm: Value | int | None = None) -> Value:
        """An IEEE operation, named and defined in softfloat.py ("f32.add"); flags accumulate in fcsr."""

    def time(self) -> Value:
        """The guest's time CSR."""

    def instret(self) -> Value:
        """Instructions retired, this one excluded."""
