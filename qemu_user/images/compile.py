"""Compiles a small guest, given as LLVM IR, to a flat binary: `python -m qemu_user.images.compile < ir > binary`.

A process of its own, for it loads LLVM (llvmlite's RISC-V back end), which a VM's device process never does. Code is
linked at no address: everything is in .text and reached relative to pc. Started by builtin.py.
"""

from __future__ import annotations

import struct
import sys

import llvmlite.binding as llvm

#: Every guest of ours runs on these.
FEATURES = "+m,+a,+f,+d,+c,+zicsr,+zifencei"
#: What Linux's Documentation/arch/riscv/boot-image-header.rst says, so that loaders know the binary; entered at its start,
#: which jumps behind it and gives the guest a stack 1 MiB further on.
HEADER = struct.pack("<IIQQQIIQQII", 0x0400006F, 0, 0x200000, 0x10000, 0, 2, 0, 0, 0x5643534952, 0x05435352, 0)
#: auipc sp, 0x100; j over the stub; the stub at +72: ecall; ret. Called as a function, it puts its eight words where the SBI
#: wants them: RISC-V's calling convention passes them in a0 to a7.
STACK = struct.pack("<IIIHH", 0x00100117, 0x00C0006F, 0x00000073, 0x8082, 0x0001)
#: Where the stub lies once the guest is loaded where every kernel is.
ECALL = 0x80200000 + len(HEADER) + 8


def compile_ir(text: str) -> bytes:
    """The guest: header, stack, then the module's code, whose first function is where it begins. ValueError."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple("riscv64-unknown-elf")
    machine = target.create_target_machine(features=FEATURES, codemodel="medium", reloc="static", opt=2)
    try:
        module = llvm.parse_assembly(text)
        module.verify()
        return HEADER + STACK + _text_section(machine.emit_object(module))
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _text_section(obj: bytes) -> bytes:
    (table,) = struct.unpack_from("<Q", obj, 40)
    count, names_index = struct.unpack_from("<HH", obj, 60)
    headers = [struct.unpack_from("<IIQQQQIIQQ", obj, table + 64 * index) for index in range(count)]
    names = headers[names_index][4]
    text = None
    for header in headers:
        end = obj.index(b"\0", names + header[0])
        name = obj[names + header[0] : end]
        if name == b".rela.text" and header[5]:
            raise ValueError("the text refers to symbols that are not in it")
        if name == b".text":
            text = obj[header[4] : header[4] + header[5]]
    if text is None:
        raise ValueError("nothing in .text")
    return text


if __name__ == "__main__":
    sys.stdout.buffer.write(compile_ir(sys.stdin.read()))
