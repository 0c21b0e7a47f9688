"""A test case of bare guest code, and what is left when it ends: the currency of the differential tests.

Every runner (qemu_peer.py, engine_peer.py) takes a Case and gives an Outcome. A case owns the guest's whole
memory: WINDOW_SIZE bytes at WINDOW. It starts in S or U mode with the registers given and ends by an ecall
from S-mode with a7 = END; any other SBI call is answered -2 (not supported), as an unknown extension is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

WINDOW = 0x80200000
WINDOW_SIZE = 128 << 10
END = 0x0A5E57
"""The extension id that ends a case: in none of the ranges that KVM forwards."""

CSR_NAMES = (
    "fcsr", "sstatus", "sie", "stvec", "scounteren", "senvcfg", "sscratch",
    "sepc", "scause", "stval", "sip", "stimecmp", "satp",
)  # fmt: skip
"""Written before a case in this order, and read after it."""

SSTATUS_FS = 3 << 13
SSTATUS_DEFAULT = SSTATUS_FS | 2 << 32


def default_csrs() -> dict[str, int]:
    """Values of every CSR of CSR_NAMES for a quiet start: FPU on, no interrupt enabled, no timer set."""
    values = dict.fromkeys(CSR_NAMES, 0)
    return values | {"sstatus": SSTATUS_DEFAULT, "stimecmp": (1 << 64) - 1, "scounteren": 7}


@dataclass
class Case:
    """Where a program starts. `image` is loaded at WINDOW, the rest of the window is zero."""

    image: bytes
    pc: int = WINDOW
    user: bool = False
    x: list[int] = field(default_factory=lambda: [0] * 32)
    f: list[int] = field(default_factory=lambda: [0] * 32)
    csrs: dict[str, int] = field(default_factory=default_csrs)
    name: str = ""
    keep: tuple[int, ...] = ()
    """Registers that every round begins with as they are in x; others go on as the last round has left them."""
    fresh: slice = field(default_factory=lambda: slice(0))
    """What of the image every round begins with."""


@dataclass
class Outcome:
    """What is left. status: "done", "timeout" (did not reach its end), or what else happened, in words."""

    status: str
    pc: int
    x: list[int]
    f: list[int]
    csrs: dict[str, int]
    window: bytes


def differences(a: Outcome, b: Outcome, excused: frozenset[str] = frozenset()) -> list[str]:
    """Names of the fields in which two outcomes differ with both values; `excused` names are left out."""
    if a.status != b.status:
        return [f"status: {a.status} / {b.status}"]
    if a.status == "timeout":
        return []
    found = []
    pairs = [("pc", a.pc, b.pc)]
    pairs += [(f"x{i}", a.x[i], b.x[i]) for i in range(1, 32)]
    pairs += [(f"f{i}", a.f[i], b.f[i]) for i in range(32)]
    pairs += [(name, a.csrs[name], b.csrs[name]) for name in CSR_NAMES]
    for name, left, right in pairs:
        if left != right and name not in excused:
            found.append(f"{name}: {left:#x} / {right:#x}")
    if a.window != b.window:
        for offset in range(0, WINDOW_SIZE, 8):
            left_bytes, right_bytes = a.window[offset : offset + 8], b.window[offset : offset + 8]
            if left_bytes != right_bytes:
                left, right = (int.from_bytes(v, "little") for v in (left_bytes, right_bytes))
                found.append(f"memory {WINDOW + offset:#x}: {left:#x} / {right:#x}")
                if len(found) > 40:
                    break
    return found
