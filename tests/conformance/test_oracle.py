"""Replays the recorded behaviour of real RISC-V KVM against a kvmcore, through the client, with real guest code.

Each check agrees, or stands in docs/deviations.md. That page is parsed here: a difference it does not list fails, and so
does one that it lists and that is no longer there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .oracle import guest
from .oracle.backend import ClientBackend
from .oracle.port import Port
from .oracle.record import recorded
from .oracle.replay import replay

DEVIATIONS = Path(__file__).resolve().parents[2] / "docs" / "deviations.md"
KERNELS = {"7.2": "7.2.13", "6.12": "6.12.107"}
MOST_DEVIATIONS = 15


def deviations(compat: str) -> set[str]:
    """Names of the checks that docs/deviations.md lists for one compat."""
    names: set[str] = set()
    for line in DEVIATIONS.read_text(encoding="utf-8").splitlines():
        match = re.match(r"- (?:(7\.2|6\.12): )?`(.*)`$", line)
        if match and match[1] in (None, compat):
            names.add(match[2])
    return names


def test_the_list_is_short() -> None:
    headings = re.findall(r"^## \d+\.", DEVIATIONS.read_text(encoding="utf-8"), re.MULTILINE)
    assert 0 < len(headings) <= MOST_DEVIATIONS
    for compat, kernel in KERNELS.items():
        listed = deviations(compat)
        assert listed <= recorded(kernel).keys()
        assert len(listed) <= MOST_DEVIATIONS + 5 * (compat == "6.12")


@pytest.mark.skipif(not shutil.which("riscv64-linux-gnu-gcc"), reason="no RISC-V cross compiler")
def test_the_guest_program_is_what_it_says(tmp_path: Path) -> None:
    source = tmp_path / "guest.S"
    source.write_text(ASSEMBLY)
    image = tmp_path / "guest.o"
    subprocess.run(
        ["riscv64-linux-gnu-gcc", "-march=rv64imafd", "-mno-relax", "-c", str(source), "-o", str(image)],
        check=True, timeout=60,
    )  # fmt: skip
    binary = tmp_path / "guest.bin"
    subprocess.run(
        ["riscv64-linux-gnu-objcopy", "-O", "binary", "-j", ".text", str(image), str(binary)],
        check=True, timeout=60,
    )  # fmt: skip
    assembled = binary.read_bytes()
    for offset, (label, words) in guest.BLOCKS.items():
        ours = guest.code()[offset : offset + 4 * len(words)]
        assert assembled[offset : offset + 4 * len(words)] == ours, label


ASSEMBLY = """
    .option norelax
    lui t0, 0x10000
    lw a0, 0(t0); ld a1, 8(t0); lbu a2, 3(t0); sb a2, 1(t0); sd a1, 16(t0); lw a3, 1(t0)
    .org 0x20; ecall; 1: j 1b
    .org 0x28; ebreak; nop; ebreak; 1: j 1b
    .org 0x38
2:  sd zero, 0(t1); add t1, t1, t2; addi t3, t3, -1; bnez t3, 2b; lui t0, 0x10000; sw zero, 0(t0); 1: j 1b
    .org 0x68; amoadd.w a0, a1, (t0)
    .org 0x74; fld fa0, 0(t0)
    .org 0x80; sw t1, 4(t0); sw t1, 0(t0); sw t1, 8(t0); 1: j 1b
    .org 0x94; 1: j 1b
    .org 0x98; wfi; lui t0, 0x10000; sw zero, 0(t0); 1: j 1b
    .org 0xb8; csrrw a0, 0x015, zero; 1: j 1b
    .org 0xc0
    lui a7, 0x485; addi a7, a7, 0x34d; li a6, 0; li a0, 1; li a2, 0x55; auipc a1, 0; addi a1, a1, 0x14; ecall
    lui t0, 0x10000; sw a0, 0(t0)
    .org 0xe8
    lui t0, 0x10000; nop; sw a0, 4(t0); sw a1, 8(t0); csrr a2, satp; sw a2, 12(t0)
    lui a7, 0x485; addi a7, a7, 0x34d; li a6, 1; ecall; 1: j 1b
    .org 0x120; csrr a0, 0x015
    .org 0x130; csrw 0x7c0, a0
    .org 0x140; csrr a0, 0x600
"""


@pytest.mark.parametrize("compat", KERNELS)
def test_replay(compat: str, tmp_path: Path) -> None:
    with ClientBackend(compat, tmp_path) as backend:
        observed = dict(replay(Port(backend, compat)))
    expected = recorded(KERNELS[compat])
    differing = {name for name, result in expected.items() if observed.get(name) != result}
    listed = deviations(compat)
    unlisted = [f"{name}: {expected[name]!r}, here {observed.get(name)!r}" for name in sorted(differing - listed)]
    assert not unlisted, "\n".join(unlisted)
    assert not listed - differing, "no longer different: " + ", ".join(sorted(listed - differing))
    unknown = observed.keys() - expected.keys()
    assert len(unknown) <= len(differing), sorted(unknown)
