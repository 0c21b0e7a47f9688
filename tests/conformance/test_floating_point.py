"""Every F and D instruction, in every rounding mode, over many operands: softfloat (in the reference), the
host's floating-point unit (tier 1) and QEMU's softfloat give the same results and the same flags.

Each case is a loop over a table of operand triples that stores the result and fflags of every turn.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest

from tests.framework import qemu_peer
from tests.framework.asm import assemble
from tests.framework.cases import END, WINDOW, Case, Outcome, differences
from tests.framework.encodings import ENCODINGS
from tests.framework.engine_peer import EnginePeer
from tests.framework.random_values import double, integer, single

TURNS = 300
OPERANDS, RESULTS = WINDOW + 0x1000, WINDOW + 0x10000
ROUNDINGS = ("rne", "rtz", "rdn", "rup", "rmm")
#: Form of an instruction -> its operands in the loop.
TEXTS = {
    "FR": "f0, f1, f2", "FRM": "f0, f1, f2, {rm}", "FR1M": "f0, f1, {rm}", "FR4": "f0, f1, f2, f3, {rm}",
    "FCMP": "x9, f1, f2", "FTOX": "x9, f1", "FTOXM": "x9, f1, {rm}", "XTOF": "f0, x10",
    "XTOFM": "f0, x10, {rm}",
}  # fmt: skip
NAMES = [row.name for row in ENCODINGS.values() if row.form in TEXTS]


def operand(rng: random.Random, name: str) -> int:
    """Mostly of the format that the instruction reads."""
    singles = name.endswith(".s") or ".s." in name or ".x.w" in name
    if rng.random() < 0.03:
        return integer(rng)
    return 0xFFFFFFFF << 32 | single(rng) if singles else double(rng)


def case(name: str, rounding: str, dynamic: bool) -> Case:
    rng = random.Random(f"{name} {rounding}")
    rm = "dyn" if dynamic else rounding
    text = f"""
        li x5, {OPERANDS}
        li x6, {RESULTS}
        li x7, {TURNS}
        csrwi frm, {ROUNDINGS.index(rounding) if dynamic else 0}
    turn:
        fld f1, 0(x5)
        fld f2, 8(x5)
        fld f3, 16(x5)
        ld x10, 24(x5)
        csrwi fflags, 0
        {name} {TEXTS[ENCODINGS[name].form].format(rm=rm)}
        csrr x8, fflags
        fsd f0, 0(x6)
        sd x9, 8(x6)
        sd x8, 16(x6)
        addi x5, x5, 32
        addi x6, x6, 24
        addi x7, x7, -1
        bnez x7, turn
        li a7, {END}
        ecall
    """
    image = assemble(text, base=WINDOW).image.ljust(OPERANDS - WINDOW, b"\0")
    for _ in range(TURNS):
        image += struct.pack("<4Q", *(operand(rng, name) for _ in range(3)), integer(rng))
    return Case(image, name=f"{name} {rm}")


def cases(name: str) -> list[Case]:
    if "{rm}" not in TEXTS[ENCODINGS[name].form]:
        return [case(name, "rne", True)]
    # A static mode that is not frm's is the reference's business, so few of those; dynamic ones in full.
    return [case(name, rounding, True) for rounding in ROUNDINGS] + [case(name, "rtz", False)]


def explain(what: str, a: Case, left: Outcome, right: Outcome) -> str:
    """The first turn that differs, with its operands."""
    for turn in range(TURNS):
        at = RESULTS - WINDOW + 24 * turn
        if left.window[at : at + 24] != right.window[at : at + 24]:
            given = struct.unpack_from("<4Q", a.image, OPERANDS - WINDOW + 32 * turn)
            results = [struct.unpack_from("<3Q", o.window, at) for o in (left, right)]
            shown = [" ".join(f"{v:#x}" for v in values) for values in (given, *results)]
            return f"{a.name}, {what}: operands {shown[0]}: {shown[1]} / {shown[2]} (f0, x9, fflags)"
    return f"{a.name}, {what}: {differences(left, right)}"


@pytest.fixture(scope="module")
def tier1() -> EnginePeer:
    return EnginePeer(limit=2)


@pytest.fixture(scope="module")
def reference() -> EnginePeer:
    return EnginePeer(reference=True)


@pytest.fixture(scope="module")
def qemu() -> Iterator[qemu_peer.QemuPeer]:
    if not qemu_peer.available():
        pytest.skip("needs qemu-system-riscv64 (apt install qemu-system-misc)")
    with qemu_peer.QemuPeer(limit=1) as peer:
        yield peer


@pytest.mark.parametrize("name", NAMES)
def test_tier1_equals_softfloat(name: str, tier1: EnginePeer, reference: EnginePeer) -> None:
    given = cases(name)
    for a, left, right in zip(given, reference.run(given), tier1.run(given), strict=True):
        assert left.status == "done"
        assert not differences(left, right), explain("softfloat / tier 1", a, left, right)


@pytest.mark.qemu
def test_tier1_equals_qemu(tier1: EnginePeer, qemu: qemu_peer.QemuPeer) -> None:
    given = [a for name in NAMES for a in cases(name)]
    wrong = []
    for a, left, right in zip(given, qemu.run(given), tier1.run(given), strict=True):
        if differences(left, right):
            wrong.append(explain("QEMU / tier 1", a, left, right))
    assert not wrong, "\n".join(wrong)
