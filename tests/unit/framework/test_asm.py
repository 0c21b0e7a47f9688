"""The tests' own assembler agrees with GNU as, instruction by instruction and on whole guests."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.framework.asm import AssemblyError, assemble, load_immediate
from tests.framework.encodings import ENCODINGS, ROUNDING
from tests.framework.fields import encode, kinds

AS = next((t for t in ("riscv64-unknown-elf-as", "riscv64-linux-gnu-as") if shutil.which(t)), None)
needs_gnu = pytest.mark.skipif(AS is None, reason="no riscv64 binutils here")
VALUES = [0, 1, -1, 2047, 2048, -2048, 1 << 31, (1 << 63) - 1, 1 << 63, 0x123456789ABCDEF0]
BAD = ["addi a0, a0, 2048", "c.addi4spn a0, sp, 0", "bogus a0", "j nowhere", "lw a0, a1"]
MARCH = "-march=rv64imafdc_zicsr_zifencei_zba_zbb_zbs_zicbom_zicboz_zihintpause"


def gnu(text: str, tmp_path: Path) -> bytes:
    """The .text that GNU as and ld make of it, linked at 0x80200000."""
    assert AS is not None
    source, obj, elf, flat = (tmp_path / name for name in ("a.s", "a.o", "a.elf", "a.bin"))
    source.write_text(".option norelax\n.globl _start\n_start:\n" + text)
    subprocess.run([AS, MARCH, "-mabi=lp64d", "-o", obj, source], check=True)
    subprocess.run([AS.replace("-as", "-ld"), "--no-relax", "-Ttext=0x80200000", "-o", elf, obj], check=True)
    subprocess.run([AS.replace("-as", "-objcopy"), "-O", "binary", "-j", ".text", elf, flat], check=True)
    return flat.read_bytes()


def random_operand(kind: str, rng: random.Random) -> str:
    """One operand in text that fits the kind."""
    r5, r3 = rng.randrange(32), rng.randrange(8, 16)
    memory = {"mem": (-2048, 2047, 1), "smem": (-2048, 2047, 1), "cmem4": (0, 124, 4), "cmem8": (0, 248, 8)}
    memory |= {"spmem4": (0, 252, 4), "ssmem4": (0, 252, 4), "spmem8": (0, 504, 8), "ssmem8": (0, 504, 8)}
    plain = {"imm12": (-2048, 2047, 1), "imm20": (0, 0xFFFFF, 1), "shamt6": (0, 63, 1), "shamt5": (0, 31, 1)}
    plain |= {"zimm": (0, 31, 1), "imm6": (-32, 31, 1), "uimm10x4": (4, 1020, 4), "shamt6n": (1, 63, 1)}
    plain |= {"csr": (0xC00, 0xC02, 1)}
    if kind in memory:
        low, high, step = memory[kind]
        base = "sp" if kind.startswith(("sp", "ss")) else f"x{r3 if kind.startswith('c') else r5}"
        return f"{rng.randrange(low, high + 1, step)}({base})"
    if kind in plain:
        low, high, step = plain[kind]
        return str(rng.randrange(low, high + 1, step))
    match kind:
        case "atomic":
            return f"(x{r5})"
        case "branch" | "jump" | "cjump" | "cbranch":
            return f". + {rng.randrange(-128, 127) * 2}"
        case "rm":
            return rng.choice(list(ROUNDING))
        case "pred" | "succ":
            return rng.choice(["iorw", "rw", "r", "w", "iow"])
        case "sp":
            return "sp"
        case "immlui":
            return str(rng.choice([1, 31, 0xFFFE0, 0xFFFFF]))
        case "imm10x16":
            return str(rng.choice([-512, 496, 16, -16]))
        case "rdn" | "rs2n":
            return f"x{rng.randrange(1, 32)}"
        case "rdlui":
            return "x9"
    if kind.endswith("'"):
        return f"{'f' if kind.startswith('f') else 'x'}{r3}"
    return f"{'f' if kind.startswith(('f', 'cf')) else 'x'}{r5}"


@needs_gnu
def test_every_instruction_equals_gnu_as(tmp_path: Path) -> None:
    rng = random.Random(1)
    lines = []
    for name, encoding in ENCODINGS.items():
        for _ in range(6):
            operands = [random_operand(kind, rng) for kind in kinds(name)]
            if name.endswith("c.nop") or encoding.form == "CNOP":
                operands = [str(rng.randrange(1, 31))]
            if name in ("fcvt.d.s", "fcvt.d.w", "fcvt.d.wu"):
                operands.pop()
            if name.startswith(("c.srli", "c.srai")):
                operands[1] = str(rng.randrange(1, 64))
            suffix = rng.choice(["", ".aq", ".rl", ".aqrl"]) if encoding.extension == "A" else ""
            option = "rvc" if encoding.extension == "C" else "norvc"
            lines.append(f".option {option}\n{name}{suffix} {', '.join(operands)}")
            if name == "c.addi" and operands[1] == "0":
                lines.pop()
    ours = assemble("\n".join(lines), base=0x80200000).image
    theirs = gnu("\n".join(lines), tmp_path)
    assert ours == theirs


@needs_gnu
def test_pseudo_instructions_and_directives_equal_gnu_as(tmp_path: Path) -> None:
    text = """
    .option norvc
    .equ BIT, 1 << 5
    .macro put a, b=3
        li \\a, \\b
    .endm
    1:  la a0, message
        j 2f
        beqz a0, 1b
        bgtu a0, a1, 2f
    2:  jal function
        put t0
        put t1, BIT | 2
        csrw sscratch, t0
        csrsi sstatus, 2
        csrr a0, time
        mv a0, a1; not a1, a2
        neg a0, a3 ; seqz a0, a0
        .rept 3
        addi a0, a0, 1
        .endr
        jalr a0
        jr a1
        fmv.d fa0, fa1
        fabs.s fa0, fa1
        fneg.d ft0, ft11
        fadd.d fa0, fa1, fa2
        fcvt.w.d a0, fa0, rtz
        fence
        lw a0, 4*3(sp)
    .skip 4
    message: .asciz "hello; \\"# world\\n"
    .skip 7
    function: ret
        .dword message, function - message
        .word 1, 2, 3
        .half 0xffff
        .byte 'a', 2
        .zero 5
    """
    ours = assemble(text, base=0x80200000).image
    assert ours == gnu(text, tmp_path)[: len(ours)]


@pytest.mark.parametrize("value", [0, 1, -1, 2047, 2048, -2048, 1 << 31, (1 << 63) - 1, 1 << 63, 0x123456789ABCDEF0])
def test_load_immediate_gives_the_value(value: int) -> None:
    register = 0
    for step, immediate in load_immediate(value):
        match step:
            case "lui":
                register = (immediate << 12) - ((immediate >> 19) << 32)
            case "slli":
                register <<= immediate
            case "addiw":
                low = register + immediate & 0xFFFFFFFF
                register = low - ((low >> 31) << 32)
            case _:
                register += immediate
    assert register & (1 << 64) - 1 == value & (1 << 64) - 1


@pytest.mark.parametrize("text", ["addi a0, a0, 2048", "c.addi4spn a0, sp, 0", "bogus a0", "j nowhere", "lw a0, a1"])
def test_bad_text_is_refused(text: str) -> None:
    with pytest.raises(AssemblyError):
        assemble(text)


def test_encode_takes_numbers() -> None:
    assert encode("addi", [10, 11, -1]) == 0xFFF58513
