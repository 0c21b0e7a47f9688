"""Floating point on the host's SSE unit: exact flags and rounding, as kvmcore/isa/softfloat.py defines them.

While guest code runs, MXCSR holds the guest's rounding mode and accrues its flags. Operations are LLVM's strict
constrained intrinsics, which neither fold nor move. What SSE does otherwise than RISC-V is patched here: saturating
conversions, unsigned conversions. Round-to-nearest-ties-away has no host mode: the reference does those.
Host-specific: this file is the only one that knows MXCSR.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmcore.engine import hart_state
from kvmcore.ir import value as value_module
from kvmcore.ir.value import Value, as_value, const, select

if TYPE_CHECKING:
    from kvmcore.engine.native_hart import Code, HandlerHart

_MASKED = 0x1F80  # all exceptions masked, nothing flushed
_FLAG_BITS = 0x3F
#: MXCSR.RC of frm, two bits each: RNE 0, RTZ 3, RDN 1, RUP 2, others 0.
_ROUNDING = 0b00_00_00_00_10_01_11_00
RMM = 4
NV, DZ, OF, UF, NX = 16, 8, 4, 2, 1


def _effect(opcode: str, args: tuple[Value, ...], width: int = 0, attrs: tuple[object, ...] = ()) -> Value:
    active = value_module.active
    assert active is not None
    return active.effect(opcode, args, width, attrs)


class FloatingPoint:
    """The floating-point side of one piece of native code."""

    def __init__(self, code: Code) -> None:
        self._code = code

    # -- fcsr --------------------------------------------------------------------------------------------------
    def _read(self) -> Value:
        return _effect("mxcsr_read", (self._code.s + hart_state.offset("mxcsr"),), 32)

    def _write(self, mxcsr: Value) -> None:
        _effect("mxcsr_write", (self._code.s + hart_state.offset("mxcsr"), mxcsr))

    def read_flags(self) -> Value:
        """fflags, 8 bits: NV DZ OF UF NX from MXCSR's IE ZE OE UE PE."""
        m = self._read()
        nx, uf, of = (m >> 5) & NX, (m >> 3) & UF, (m >> 1) & OF
        return (nx | uf | of | ((m << 1) & DZ) | ((m << 4) & NV)).trunc(8)

    def write_flags(self, flags: Value) -> None:
        self._write((self._read() & ~_FLAG_BITS) | self._flag_bits(flags))

    def _flag_bits(self, flags: Value) -> Value:
        v = flags.zext(32)
        return ((v & NX) << 5) | ((v & UF) << 3) | ((v & OF) << 1) | ((v & DZ) >> 1) | ((v & NV) >> 4)

    def write_rounding(self, frm: Value) -> None:
        self._write((self._read() & ~0x6000) | self._rounding_bits(frm))

    def _rounding_bits(self, frm: Value) -> Value:
        return ((const(32, _ROUNDING) >> (frm.zext(32) << 1)) & 3) << 13

    def raise_flags(self, flags: int) -> None:
        """Accrue flags that the host's operation does not raise."""
        self._write(self._read() | self._flag_bits(const(8, flags)))

    def enter(self) -> None:
        """Guest code begins: MXCSR from the hart's fields."""
        h = self._code
        flags = value_module.active and self._load8("fflags")
        assert flags is not None
        self._write(self._flag_bits(flags) | self._rounding_bits(h.get("frm")) | _MASKED)

    def leave(self) -> None:
        """Guest code ends: the flags into the hart's field."""
        _effect("store", (self._code.address("fflags"), self.read_flags()), 0, ("plain", 1))

    def _load8(self, name: str) -> Value:
        return _effect("load", (self._code.address(name),), 8, ("plain", 1))

    # -- operations --------------------------------------------------------------------------------------------
    def operation(self, h: HandlerHart, name: str, args: tuple[Value, ...], rm: Value | int | None) -> Value:
        """One operation of softfloat.py ("f32.add"); rounding by rm, or dynamic."""
        kind, _, operation = name.partition(".")
        width = {"f32": 32, "f64": 64}[kind]
        if rm is not None:
            self._check_rounding(h, operation, as_value(rm, 8))
        return OPERATIONS[operation](self, width, args)

    def _check_rounding(self, h: HandlerHart, operation: str, rm: Value) -> None:
        """Go on only where the host's mode is the wanted one; the reference does the rest."""
        if rm == 7:
            if h.get("frm") >= RMM:
                h.exit("EMULATE")
        elif rm != h.get("frm") or rm >= RMM:
            h.exit("EMULATE")

    def host(self, operation: str, width: int, args: tuple[Value, ...], result: int, *rest: int) -> Value:
        return _effect("fp", args, result, (operation, width, *rest))


OPERATIONS: dict[str, object] = {}  # type: ignore[assignment]
_ = select
