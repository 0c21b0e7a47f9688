"""Small guests of our own, compiled when they are first wanted: they need no network and boot in milliseconds.

Each is LLVM IR, entered as a kernel is: S-mode, hart in a0, FDT in a1. They speak to the SBI and shut down by SRST.
Called by `softkvm run`; the binary is cached beside the images, under a digest of its text.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from qemu_user.images.errors import ImageError

_SRST, _DBCN = 0x53525354, 0x4442434E
#: The stub `ecall; ret` that compile.py puts in front of every guest.
_ECALL = 0x80200048


def _sbi(extension: int, function: int, argument: int = 0) -> str:
    """A hypercall with one argument, as a line of IR."""
    words = [argument, 0, 0, 0, 0, 0, function, extension]
    return f"  call i64 inttoptr (i64 {_ECALL} to ptr)({', '.join(f'i64 {word}' for word in words)})\n"


def _module(body: str) -> str:
    """A guest that does `body`, then shuts down."""
    head = 'target triple = "riscv64-unknown-elf"\ndefine void @start() {\n'
    return f"{head}{body}{_sbi(_SRST, 0)}  ret void\n}}\n"


_HELLO = "".join(_sbi(_DBCN, 2, byte) for byte in b"Hello from S-mode, on a software vCPU.\n")
_COUNT = """entry:
  br label %loop
loop:
  %n = phi i64 [ 500000000, %entry ], [ %m, %loop ]
  %m = sub i64 %n, 1
  call void @llvm.donothing()
  %done = icmp eq i64 %m, 0
  br i1 %done, label %out, label %loop
out:
"""

#: Name -> (what it does, text).
GUESTS: dict[str, tuple[str, str]] = {
    "hello": ("prints a line over the SBI and shuts down", _module(_HELLO)),
    "count": ("counts 500 million down and shuts down", _module(_COUNT)),
}


def ensure(name: str, folder: Path) -> Path:
    """The guest's binary in `folder`, compiled if it is not there. ImageError."""
    text = GUESTS[name][1]
    path = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.bin"
    if path.exists():
        return path
    command = [sys.executable, "-P", "-m", "qemu_user.images.compile"]
    result = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    if result.returncode != 0:
        last = (result.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise ImageError(f"cannot compile the guest {name!r}: {last}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".new-")
        with os.fdopen(handle, "wb") as file:
            file.write(result.stdout)
        os.replace(temporary, path)
    except OSError as error:
        raise ImageError(f"cannot write the guest {name!r} into {folder}: {error.strerror}") from error
    return path
