"""Runs cases on Debian's qemu-system-riscv64, many per QEMU process.

QEMU's RAM is a shared file that this process maps too. A small M-mode shim (qemu_shim.S) polls a mailbox in
it, copies each case into the window, runs it in S or U mode and writes its registers and memory back. So a
batch costs about 0.2 ms a case, and one QEMU serves a whole test run. Used by the differential tests only.
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tests.framework.asm import assemble_files
from tests.framework.cases import CSR_NAMES, END, WINDOW, WINDOW_SIZE, Case, Outcome

QEMU = shutil.which("qemu-system-riscv64")
RAM = 0x80000000
MAILBOX = 0x80010000
SLOTS = 0x81000000
SLOT_SIZE = 4096 + WINDOW_SIZE
SLOTS_PER_BATCH = 256
_RAM_SIZE = SLOTS - RAM + SLOTS_PER_BATCH * SLOT_SIZE
_RAM_SIZE += -_RAM_SIZE % (2 << 20)

# A slot's header, in the shim's words: status, mode, pc, x0..x31, f0..f31, CSRs, watchdog ticks, last mcause.
_HEADER = struct.Struct(f"<QQQ32Q32Q{len(CSR_NAMES)}QQQ")
_STATUS = {0: "not run", 1: "done", 2: "timeout"}
_CPU = "rv64,h=false,sstc=true,zba=true,zbb=true,zbs=true,zbc=false"
_MENVCFG = 1 << 63 | 1 << 7 | 1 << 6 | 3 << 4  # STCE, CBZE, CBCFE, CBIE
_TICKS_PER_SECOND = 10_000_000


class QemuPeer:
    """One QEMU process. A context manager; run() may be called any number of times."""

    def __init__(self, limit: float = 0.5, cpu: str = _CPU) -> None:
        """`limit`: seconds after which a case counts as "timeout"."""
        if QEMU is None:
            raise RuntimeError("qemu-system-riscv64 is not installed")
        self._limit = int(limit * _TICKS_PER_SECOND)
        self._directory = tempfile.TemporaryDirectory(prefix="qemu-peer-", dir="/dev/shm")
        folder = Path(self._directory.name)
        shim = assemble_files(
            Path(__file__).with_name("qemu_shim.S"), base=RAM, WINDOW=WINDOW, WINDOW_SIZE=WINDOW_SIZE,
            MAILBOX=MAILBOX, SLOTS=SLOTS, END=END, MENVCFG=_MENVCFG, MTIME=0x200BFF8, MTIMECMP=0x2004000,
        )  # fmt: skip
        (folder / "shim").write_bytes(shim.image)
        with (folder / "ram").open("w+b") as file:
            file.truncate(_RAM_SIZE)
            self._ram = mmap.mmap(file.fileno(), _RAM_SIZE)
        backend = f"memory-backend-file,id=ram,mem-path={folder / 'ram'},share=on,size={_RAM_SIZE}"
        # Two harts, of which one sleeps: with a single one QEMU runs AMOs as a load and a store, and gives
        # the wrong cause when they fault.
        machine = ["-smp", "2", "-M", "virt,memory-backend=ram", "-cpu", cpu]
        machine += ["-object", backend, "-m", str(_RAM_SIZE >> 20)]
        quiet = ["-display", "none", "-serial", "none", "-monitor", "none", "-nodefaults"]
        self._process = subprocess.Popen([QEMU, *machine, "-bios", str(folder / "shim"), *quiet])
        self._batch = 0

    def __enter__(self) -> QemuPeer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends QEMU and removes its memory."""
        self._process.kill()
        self._process.wait()
        self._ram.close()
        self._directory.cleanup()

    def run(self, cases: Sequence[Case]) -> list[Outcome]:
        """What is left of each case."""
        outcomes: list[Outcome] = []
        for start in range(0, len(cases), SLOTS_PER_BATCH):
            outcomes += self._run(cases[start : start + SLOTS_PER_BATCH])
        return outcomes

    def _run(self, cases: Sequence[Case]) -> list[Outcome]:
        for index, case in enumerate(cases):
            at = SLOTS - RAM + index * SLOT_SIZE
            csrs = [case.csrs[name] for name in CSR_NAMES]
            header = _HEADER.pack(0, not case.user, case.pc, *case.x, *case.f, *csrs, self._limit, 0)
            self._ram[at : at + len(header)] = header
            self._ram[at + 4096 : at + SLOT_SIZE] = case.image.ljust(WINDOW_SIZE, b"\0")
        mailbox = MAILBOX - RAM
        self._batch += 1
        self._ram[mailbox + 8 : mailbox + 16] = len(cases).to_bytes(8, "little")
        self._ram[mailbox : mailbox + 8] = self._batch.to_bytes(8, "little")
        deadline = time.monotonic() + 60 + len(cases) * self._limit / _TICKS_PER_SECOND
        while int.from_bytes(self._ram[mailbox + 40 : mailbox + 48], "little") != self._batch:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"QEMU stopped answering (exit status {self._process.returncode})")
            time.sleep(0.0005)
        return [self._outcome(index) for index in range(len(cases))]

    def _outcome(self, index: int) -> Outcome:
        at = SLOTS - RAM + index * SLOT_SIZE
        values = _HEADER.unpack_from(self._ram, at)
        status = _STATUS.get(values[0], f"trap to M-mode, cause {values[-1]:#x}")
        csrs = dict(zip(CSR_NAMES, values[67:-2], strict=True))
        window = self._ram[at + 4096 : at + SLOT_SIZE]
        return Outcome(status, values[2], list(values[3:35]), list(values[35:67]), csrs, window)


def available() -> bool:
    """Whether the peer can run here."""
    return QEMU is not None and os.access("/dev/shm", os.W_OK)
