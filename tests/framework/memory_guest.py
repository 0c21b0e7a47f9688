"""A guest that knows whether its memory is right: it counts in every page, round after round, and checks.

The oracle of QEMU's migration tests: a page that was lost, sent too early or torn has another count than its
neighbours. It prints '.' to the UART after each round, 'X' for a page that is wrong, 'T' if time has gone back, and
shuts down after either. `pages` says how much it dirties, `pause` how many idle ticks (10 MHz) lie between rounds. With
`flash` it also notes each round in the flash's bank 1, 64 rounds between two erasures, and prints 'F' if the note of the
round before, or the first word of bank 0, is another one.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from protocol.abi.errors import KvmError
from qemu_user.backends.block.opening import create_overlay, open_disk
from qemu_user.backends.block.qcow2.create import create_qcow2
from qemu_user.config.machine_config import Boot, Chardev, Drive, Flash, MachineConfig
from qemu_user.devices.pflash import BANK_SIZE
from qemu_user.machine.machine import Machine
from tests.framework.asm import assemble

LOAD = 0x8020_0000
DATA = 0x8100_0000
MIB = 1 << 20

SOURCE = """
    .equ UART, 0x10000000
    .equ DATA, 0x81000000
    .equ CODE, 0x20000000
    .equ NOTES, 0x22000000
start:
    bnez a0, park
    li s7, FLASH
    beqz s7, no_flash
    li t0, CODE
    lwu s5, 0(t0)
    li s8, 0xff00ff
no_flash:
    li s0, PAGES
    li s1, 0              # the round
    rdtime s4
round:
    li s2, DATA
    mv s3, s0
page:
    ld t0, 0(s2)
    bne t0, s1, wrong
    ld t1, 2040(s2)
    bne t1, s1, wrong
    addi t0, t0, 1
    sd t0, 0(s2)
    sd t0, 2040(s2)
    li t2, 4096
    add s2, s2, t2
    addi s3, s3, -1
    bnez s3, page
    addi s1, s1, 1
    bnez s7, note
noted:
    rdtime t0
    bltu t0, s4, back
    mv s4, t0
    li t1, PAUSE
    add t1, t1, t0
wait:
    rdtime t0
    bltu t0, t1, wait
    li a0, '.'
    call put
    j round
note:                     # round s1 into word s1 % 64
    li t0, CODE
    lwu t1, 0(t0)
    bne t1, s5, wrong_flash
    li t0, NOTES
    andi t1, s1, 63
    beqz t1, erase
    slli t2, t1, 2
    add s6, t0, t2
    li t2, 1
    beq s1, t2, erase     # the first round of all
    lwu t3, -4(s6)
    addi t4, s1, -1
    bne t3, t4, wrong_flash
    j program
erase:
    slli t2, t1, 2
    add s6, t0, t2
    li t3, 0x00200020
    sw t3, 0(t0)
    li t3, 0x00d000d0
    sw t3, 0(t0)
program:
    li t3, 0x00400040
    sw t3, 0(s6)
    sw s1, 0(s6)
    lwu t3, 0(s6)         # its status
    li t4, 0x00800080
    bne t3, t4, wrong_flash
    sw s8, 0(s6)          # read array
    lwu t3, 0(s6)
    bne t3, s1, wrong_flash
    j noted
wrong_flash:
    li a0, 'F'
    call put
    j off
wrong:
    li a0, 'X'
    call put
    j off
back:
    li a0, 'T'
    call put
off:
    li a7, 0x53525354
    li a6, 0
    li a0, 0
    li a1, 0
    ecall
park:
    wfi
    j park
put:
    li t3, UART
    sb a0, 0(t3)
    ret
"""


def build(folder: Path, pages: int = 256, pause: int = 0, flash: bool = False) -> Path:
    """The guest as a flat kernel in `folder`."""
    path = folder / f"memory-guest-{pages}-{pause}{'-flash' if flash else ''}.bin"
    path.write_bytes(assemble(SOURCE, LOAD, PAGES=pages, PAUSE=pause, FLASH=int(flash)).image)
    return path


def config(folder: Path, name: str, pages: int = 256, pause: int = 0, memory: int = 64 * MIB, **more: Any) -> MachineConfig:
    """A machine that runs it; its output goes to NAME.out in `folder`."""
    return MachineConfig(
        name=name,
        memory=memory,
        boot=Boot(kernel=str(build(folder, pages, pause, bool(more.get("flash"))))),
        chardevs=(Chardev(id="console", kind="file", path=str(folder / f"{name}.out"), append=True),),
        console="",
        **more,
    ).validate()


def drive(path: Path, size: int = 4 * MIB, kind: str = "raw") -> Drive:
    """A disk with a pattern in it: raw, qcow2, or a qcow2 overlay over a raw file that has the pattern."""
    pattern = bytes(range(256)) * (size // 256)
    if kind == "raw":
        path.write_bytes(pattern)
        return Drive(file=str(path))
    path = path.with_suffix(".qcow2")
    if kind == "overlay":
        path.with_suffix(".base").write_bytes(pattern)
        create_overlay(path.with_suffix(".base"), path)
    else:
        create_qcow2(path, size)
        with closing(open_disk(str(path))) as disk:
            disk.write(0, [memoryview(pattern)])
    return Drive(file=str(path))


def flash(folder: Path) -> tuple[Flash, ...]:
    """Both banks: code that is only read, with something at its beginning and its end, and an empty one to write to."""
    for name in ("code", "vars"):
        with (folder / f"{name}.fd").open("wb") as file:
            file.truncate(BANK_SIZE)
    with (folder / "code.fd").open("r+b") as file:
        file.write(b"firmware")
        file.seek(BANK_SIZE - 4)
        file.write(b"last")
    return Flash(file=str(folder / "code.fd"), readonly=True), Flash(file=str(folder / "vars.fd"))


def content(path: str | Path) -> bytes:
    """What a guest sees on a disk that nobody uses."""
    with closing(open_disk(str(path), readonly=True)) as disk:
        buffer = bytearray(disk.size)
        disk.read(0, [memoryview(buffer)])
        return bytes(buffer)


def rounds(folder: Path, name: str) -> int:
    """How many rounds it has done under this name. AssertionError if something was wrong in one."""
    path = folder / f"{name}.out"
    text = path.read_bytes() if path.exists() else b""
    assert text.strip(b".") == b"", f"the guest {name} found its memory or its clock wrong: {text[-20:]!r}"
    return len(text)


def alive(machine: Machine) -> bool:
    """Whether the VM's process is there."""
    try:
        return bool(machine.vm.alive)
    except (KvmError, OSError):
        return False
