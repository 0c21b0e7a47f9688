"""A: load-reserved, store-conditional and atomic memory operations (Unprivileged ISA, chapter 14).

Hosts order all atomics as with aq and rl both set. Misaligned addresses trap (14.2, 14.4).
"""

from __future__ import annotations

from kvmcore.ir.value import Value
from kvmcore.isa import traps
from kvmcore.isa.describe import Insn, Semantics, make
from kvmcore.isa.hart import Hart, Reg
from kvmcore.isa.traps import Trap


def _aligned(address: Value, size: int, cause: int) -> Value:
    if (address & (size - 1)) != 0:
        raise Trap(cause, address)
    return address


def _load_reserved(size: int) -> Semantics:
    def lr(h: Hart, rd: Reg, rs1: Reg) -> None:
        address = _aligned(h.x[rs1], size, traps.LOAD_MISALIGNED)
        h.x[rd] = h.load_reserved(address, size).sext(64)

    return lr


def _store_conditional(size: int) -> Semantics:
    def sc(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
        address = _aligned(h.x[rs1], size, traps.STORE_MISALIGNED)
        h.x[rd] = h.store_conditional(address, h.x[rs2].trunc(8 * size)).zext(64)

    return sc


def _amo(operation: str, size: int) -> Semantics:
    def amo(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
        address = _aligned(h.x[rs1], size, traps.STORE_MISALIGNED)
        h.x[rd] = h.amo(operation, address, h.x[rs2].trunc(8 * size)).sext(64)

    return amo


def _row(name: str, funct5: str, size: int, function: Semantics, rs2: str = "rs2") -> Insn:
    suffix, funct3 = ("w", "010") if size == 4 else ("d", "011")
    function.__name__ = function.__qualname__ = f"{name}_{suffix}"
    encoding = f"{funct5} aq rl {rs2} rs1 {funct3} rd 0101111"
    return make(f"{name}.{suffix}", encoding, function, "rv64a", (), {})


_AMOS = {
    "swap": "00001", "add": "00000", "xor": "00100", "and": "01100", "or": "01000",
    "min": "10000", "max": "10100", "minu": "11000", "maxu": "11100",
}  # fmt: skip

ALIASES = [
    row
    for size in (4, 8)
    for row in (
        _row("lr", "00010", size, _load_reserved(size), "00000"),
        _row("sc", "00011", size, _store_conditional(size)),
        *(_row(f"amo{name}", funct5, size, _amo(name, size)) for name, funct5 in _AMOS.items()),
    )
]
