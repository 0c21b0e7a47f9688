"""Guests on kvmcore through the protocol: a daemon of one's own, and the smallest VMM that can run a guest.

For the conformance tests: no devices, only memory, vCPUs, the debug console and system reset. The daemon
listens in a temporary directory and dies with the test. The product's own VMM is qemu_user; see product.py.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

from protocol.abi import run_page
from protocol.abi import structs_riscv as riscv
from protocol.abi.errors import KvmError
from protocol.abi.exits import Exit
from protocol.client import Kvm, Vcpu, Vm
from tests.framework.guest_program import BASE, GuestResult, read_result

ROOT = Path(__file__).resolve().parents[2]
RAM = 0x80000000
_MOST = 4096


class Daemon:
    """`python -m kvmcore` with a socket in a directory of its own. A context manager. `descriptors`: it may have so many."""

    def __init__(self, *arguments: str, descriptors: int = 0) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="softkvm-test-")
        path = Path(self._folder.name) / "run"
        path.mkdir(mode=0o700)
        self.endpoint = f"ipc://{path / 'kvmcore.sock'}"
        reader, writer = os.pipe()
        command = [sys.executable, "-m", "kvmcore", "--listen", self.endpoint, "--ready-fd", str(writer)]
        command += ["--idle-timeout", "60"]  # a test that was killed takes its daemon along
        if descriptors:
            command = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *command]
        self.process = subprocess.Popen([*command, *arguments], pass_fds=[writer], cwd=ROOT)
        os.close(writer)
        with os.fdopen(reader, "rb") as ready:
            if not ready.read(5):
                raise RuntimeError(f"kvmcore did not start (exit status {self.process.wait()})")

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """SIGTERM, and the directory goes."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._folder.cleanup()


class GuestMachine:
    """One VM with `harts` vCPUs and the guest's image in memory."""

    def __init__(self, endpoint: str, image: bytes, harts: int = 1, memory: int = 64 << 20) -> None:
        self.kvm = Kvm.open(endpoint, name="conformance")
        self.vm: Vm = self.kvm.create_vm()
        self.memfd = self.vm.create_guest_memfd(memory)
        self.vm.set_user_memory_region2(0, RAM, memory, 0, 4, self.memfd, 0)
        self.memory = self.memfd.map()
        self.memory[BASE - RAM : BASE - RAM + len(image)] = image
        self.vcpus: list[Vcpu] = [self.vm.create_vcpu(number) for number in range(harts)]
        self.output = bytearray()
        self.problem = ""
        self.event: int | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        for number, vcpu in enumerate(self.vcpus):
            vcpu.set_one_reg(riscv.one_reg(riscv.SBI_EXT, riscv.SbiExt.DBCN), 1)
            vcpu.set_one_reg(riscv.PC, BASE)
            vcpu.set_one_reg(riscv.one_reg(riscv.CORE, 10), number)

    def run(self, seconds: float) -> GuestResult:
        """Runs the guest to its shutdown."""
        threads = [threading.Thread(target=self._vcpu, args=(vcpu,), daemon=True) for vcpu in self.vcpus]
        for thread in threads:
            thread.start()
        if not self._done.wait(seconds):
            self.problem = "timeout"
        self._done.set()
        for _ in range(50):
            for vcpu, thread in zip(self.vcpus, threads, strict=True):
                if thread.is_alive():
                    self.vm.kick(vcpu)
            if not any(thread.is_alive() for thread in threads):
                break
            time.sleep(0.02)
        text = self.output.decode("latin-1")
        if self.problem:
            where = ", ".join(f"{vcpu.id}: {vcpu.get_one_reg(riscv.PC):#x}" for vcpu in self.vcpus)
            text += f"\n({self.problem}; harts at {where})"
        return read_result(text)

    def close(self) -> None:
        """The VM and the session go."""
        self.vm.close()
        self.kvm.close()

    def _vcpu(self, vcpu: Vcpu) -> None:
        while not self._done.is_set():
            try:
                reason = vcpu.run()
            except KvmError as error:
                if error.errno == errno.EINTR:
                    continue
                self.problem = f"RUN: {error}"
                self._done.set()
                return
            page = vcpu.run_page
            if reason == Exit.RISCV_SBI:
                self._console(page)
            elif reason == Exit.SYSTEM_EVENT:
                self.event = run_page.SYSTEM_EVENT.unpack_from(page, run_page.UNION)[0]
                self._done.set()
            else:
                values = run_page.MMIO.unpack_from(page, run_page.UNION)
                self.problem = f"exit {reason}, {values}"
                self._done.set()

    def _console(self, page: memoryview) -> None:
        extension, function, count, low, high, *_ = run_page.SBI.unpack_from(page, run_page.UNION)
        error, value = riscv.SBI_NOT_SUPPORTED, 0
        if extension == riscv.SBI_DBCN and function == 2:
            self._write(bytes([count & 0xFF]))
            error = riscv.SBI_SUCCESS
        elif extension == riscv.SBI_DBCN and function in (0, 1):
            start = (low | high << 64) - RAM
            count = min(count, _MOST)
            error = riscv.SBI_INVALID_PARAM
            if 0 <= start <= len(self.memory) - count:
                error, value = riscv.SBI_SUCCESS, count if function == 0 else 0
                if function == 0:
                    self._write(self.memory[start : start + count])
        page[run_page.SBI_RET : run_page.SBI_RET + 16] = (error % (1 << 64)).to_bytes(8, "little") + value.to_bytes(8, "little")

    def _write(self, data: bytes) -> None:
        with self._lock:
            self.output += data


def run_on_kvmcore(endpoint: str, image: bytes, harts: int = 1, seconds: float = 60) -> GuestResult:
    """Runs a conformance guest to its end."""
    machine = GuestMachine(endpoint, image, harts)
    try:
        return machine.run(seconds)
    finally:
        machine.close()
