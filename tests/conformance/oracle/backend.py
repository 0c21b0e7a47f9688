"""The oracle's Backend on the real thing: a kvmcore daemon of our own, reached through protocol.client."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from protocol.abi import run_page
from protocol.abi.capabilities import DIRTY_RING_PAGE
from protocol.abi.compat import Compat
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_NAME
from protocol.channel.shared_memory import PROT_EXEC, PROT_READ, PROT_WRITE, Mapping, create_memfd
from protocol.client import Device, Kvm, Vcpu, Vm
from protocol.client.handle import Handle
from protocol.codec import control
from protocol.codec.session import Op

_RUN = BY_NAME["RUN"].number
_START_SECONDS = 60.0
_DESCRIPTORS = 400
"""Limit of the daemon, from which follows how many VMs it makes: some 40, so that the last check is quick."""
_READ_SIZE = 65536


class ClientBackend:
    """Starts `python -m kvmcore`, ends it with the context."""

    def __init__(self, compat: str, directory: Path) -> None:
        self._compat = Compat(compat)
        self._endpoint = f"ipc://{directory}/kvmcore.sock"
        self._socket = directory / "kvmcore.sock"
        self._log = open(directory / "kvmcore.log", "wb")  # closed in __exit__
        self._daemon: subprocess.Popen[bytes] | None = None
        self._rings: dict[int, Mapping] = {}

    def __enter__(self) -> ClientBackend:
        self._daemon = subprocess.Popen(
            [sys.executable, "-m", "kvmcore", "--listen", self._endpoint],
            stdout=self._log,
            stderr=self._log,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (_DESCRIPTORS, _DESCRIPTORS)),
        )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                self._kvm = Kvm.open(self._endpoint, name="oracle", compat=self._compat)
                return self
            except KvmError:
                if time.monotonic() > deadline or self._daemon.poll() is not None:
                    self.__exit__(None, None, None)
                    raise
                time.sleep(0.05)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._daemon is not None:
            self._daemon.send_signal(signal.SIGTERM)
            try:
                self._daemon.wait(60)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()
        self._log.close()

    def system(self) -> Handle:
        return self._kvm

    def create_vm(self, kind: int) -> Handle:
        return self._kvm.create_vm(kind)

    def ioctl(self, handle: Handle, request: int, argument: int, pointees: dict[int, bytearray]) -> int:
        if request == _RUN and argument == 0 and isinstance(handle, Vcpu):
            handle.run()
            return 0
        segments: dict[int, bytes | bytearray] = dict(pointees)
        return handle.ioctl(request, argument, segments)

    def adopt(self, parent: Handle, kind: str, number: int) -> Handle:
        if kind == "vcpu":
            return Vcpu(parent.link, parent.channel, number, 0)
        adopted = (Device if kind == "device" else Handle)(parent.link, parent.channel, number)
        return adopted

    def number(self, handle: Handle) -> int:
        return handle.number

    def close(self, handle: Handle) -> None:
        handle.control(control.CLOSE)

    def close_vm(self, vm: Vm) -> None:
        vm.link.close()

    def duplicate(self, handle: Vcpu) -> Handle:
        number = handle.control(control.DUP).ret
        return Vcpu(handle.link, handle.channel, number, handle.id)

    def other_process(
        self, handle: Handle, request: int, argument: int, pointees: dict[int, bytearray]
    ) -> int:
        child = os.fork()
        if child == 0:
            status = 255
            try:
                status = self.ioctl(handle, request, argument, pointees)
            except KvmError as error:
                status = 100 + (error.errno or 0)
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code >= 100:
            raise KvmError(code - 100)
        return code

    def read_file(self, handle: Handle) -> bytes:
        return handle.control(control.READ, 0, control.LENGTH.pack(_READ_SIZE)).extra

    def map(self, vm: Vm, va: int, size: int, writable: bool) -> memoryview:
        fd = create_memfd("oracle", size)
        try:
            vm.map_segment(va, size, fd, 0, 3 if writable else 1)
            return Mapping([(fd, 0, size)]).view
        finally:
            os.close(fd)

    def unmap(self, vm: Vm, va: int, size: int) -> None:
        vm.unmap_segment(va, size)

    def pass_eventfd(self, vm: Vm, fd: int) -> int:
        vm.link.say(Op.PASS_FILE, "sendmsg", fd, fds=[fd])
        return fd

    def page(self, vcpu: Vcpu) -> memoryview:
        return vcpu.run_page

    def ring(self, vcpu: Vcpu, size: int) -> memoryview:
        if vcpu.number not in self._rings:
            self._rings[vcpu.number] = vcpu.mmap(DIRTY_RING_PAGE * run_page.PAGE, size)
        return self._rings[vcpu.number].view

    def unmap_page(self, vcpu: Vcpu) -> None:
        vcpu.run_page = memoryview(bytearray(run_page.MMAP_SIZE))

    def mmap(self, vcpu: Vcpu, offset: int, size: int, private: bool, executable: bool) -> int:
        prot = PROT_READ | PROT_WRITE | (PROT_EXEC if executable else 0)
        try:
            vcpu.mmap(offset, size, prot, private=private).close()
        except OSError as error:
            return error.errno or 0
        return 0

    def kick(self, vcpu: Vcpu) -> None:
        vcpu.doorbell.set_kick()
        vcpu.control(control.KICK)
