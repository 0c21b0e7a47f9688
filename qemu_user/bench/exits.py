"""What an access to a device register costs: a bare guest that reads the UART's line status again and again.

The guest is forty instructions of machine code, made here; it reports the ticks of its loop (10 MHz) through the same
UART. Used by io.py, and side by side with QEMU, whose device answers in the process that runs the guest.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ACCESSES = 100_000
_TICKS_PER_US = 10
_LIMIT_SECONDS = 120
_ZERO, _RA, _S0, _S1, _A0, _A1, _A6, _A7, _T0, _T1, _T2 = 0, 1, 8, 9, 10, 11, 16, 17, 5, 6, 7
_TIME = 0xC01
_UART, _LINE_STATUS = 0x1000_0000, 5
_SRST = 0x53525354


def _i(opcode: int, funct3: int, rd: int, rs1: int, immediate: int) -> int:
    return (immediate & 0xFFF) << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | opcode


def _addi(rd: int, rs1: int, immediate: int) -> int:
    return _i(0x13, 0, rd, rs1, immediate)


def _load(rd: int, value: int) -> list[int]:
    """lui and addiw: any 32-bit value."""
    upper = value + 0x800 & 0xFFFFF000
    return [upper | rd << 7 | 0x37, _i(0x1B, 0, rd, rd, value - upper)]


def _branch(funct3: int, rs1: int, rs2: int, offset: int) -> int:
    """Offsets of whole instructions, in bytes."""
    bits = (offset >> 12 & 1) << 31 | (offset >> 5 & 0x3F) << 25 | (offset >> 1 & 15) << 8 | (offset >> 11 & 1) << 7
    return bits | rs2 << 20 | rs1 << 15 | funct3 << 12 | 0x63


def _sb(rs2: int, rs1: int, offset: int) -> int:
    return (offset >> 5) << 25 | rs2 << 20 | rs1 << 15 | (offset & 31) << 7 | 0x23


def program(accesses: int = ACCESSES) -> bytes:
    """The flat binary: times `accesses` loads of the line status, prints the ticks as "T" and 8 hexadecimal digits."""
    lbu = _i(0x03, 4, _T2, _T0, _LINE_STATUS)
    rdtime = [_i(0x73, 2, rd, 0, _TIME) for rd in (_S0, _S1)]
    code = [*_load(_T0, _UART), *_load(_T1, accesses)]
    code += [rdtime[0], lbu, _addi(_T1, _T1, -1), _branch(1, _T1, _ZERO, -8), rdtime[1]]
    code += [0x40000033 | _S0 << 20 | _S1 << 15 | _S1 << 7]  # sub s1, s1, s0
    code += [_addi(_T1, _ZERO, ord("T")), _sb(_T1, _T0, 0), _addi(_A0, _ZERO, 28)]
    # digit: t1 = s1 >> a0 & 15, printed as '0' + t1, ':' to '?' standing for a to f
    code += [0x00005033 | _A0 << 20 | _S1 << 15 | _T1 << 7, _i(0x13, 7, _T1, _T1, 15), _addi(_T1, _T1, ord("0"))]
    code += [_sb(_T1, _T0, 0), _addi(_A0, _A0, -4), _branch(5, _A0, _ZERO, -20)]
    code += [_addi(_T1, _ZERO, ord("\n")), _sb(_T1, _T0, 0)]
    code += [*_load(_A7, _SRST), _addi(_A6, _ZERO, 0), _addi(_A0, _ZERO, 0), _addi(_A1, _ZERO, 0), 0x73, 0x0000006F]
    return b"".join(word.to_bytes(4, "little") for word in code)


def softkvm_command(kernel: Path) -> list[str]:
    """The guest under softkvm."""
    return [sys.executable, "-P", "-m", "qemu_user.cli.main", "run", "-m", "64M", "--kernel", str(kernel)]


def qemu_command(kernel: Path) -> list[str]:
    """And under QEMU."""
    machine = ["qemu-system-riscv64", "-M", "virt", "-m", "64M", "-nographic", "-monitor", "none"]
    return [*machine, "-kernel", str(kernel)]


def uart_read(command: Callable[[Path], list[str]], accesses: int = ACCESSES) -> float:
    """Microseconds of one load from the UART. RuntimeError: the guest reported nothing."""
    with tempfile.TemporaryDirectory(prefix="softkvm-bench-") as folder:
        kernel = Path(folder) / "exits.bin"
        kernel.write_bytes(program(accesses))
        done = subprocess.run(
            command(kernel), stdin=subprocess.DEVNULL, capture_output=True, timeout=_LIMIT_SECONDS, check=False
        )
    for line in done.stdout.replace(b"\r", b"").split(b"\n"):
        if line[:1] == b"T" and len(line) == 9:
            return sum(digit - 48 << 4 * place for place, digit in enumerate(reversed(line[1:]))) / _TICKS_PER_US / accesses
    raise RuntimeError(f"the guest reported nothing: {(done.stderr or done.stdout)[-300:]!r}")
