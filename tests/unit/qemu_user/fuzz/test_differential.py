"""Comparing two KVMs: kvmcore with itself, and with a kernel that answers by the recorded rules of x86."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.abi.ioctls import BY_NAME, find
from protocol.abi.structs import MEM_LOG_DIRTY_PAGES
from qemu_user.fuzz.daemon import Daemon
from qemu_user.fuzz.dev_kvm import DevKvm, Linux
from qemu_user.fuzz.differential import DIFFERENCES, compare
from qemu_user.fuzz.executor import Executor, Outcome
from qemu_user.fuzz.grammar import GENERIC, Grammar
from qemu_user.fuzz.model import X86, Model
from qemu_user.fuzz.real import RealRun
from qemu_user.fuzz.rules import MAKES
from qemu_user.fuzz.sequence import Op


class RulesKernel:
    """A kernel of x86's documented rules: the model answers, from the bytes that the ioctl's pointer leads to."""

    def __init__(self, wrong: str = "") -> None:
        self.kinds: dict[int, str] = {}
        self.wrong = wrong
        self.model = Model(X86)

    def open(self) -> int:
        return self._new("system")

    def _new(self, kind: str) -> int:
        fd = os.open("/dev/null", os.O_RDWR)
        self.kinds[fd] = kind
        return fd

    def ioctl(self, fd: int, request: int, argument: int) -> int:
        kind = self.kinds.get(fd)
        if kind is None:
            raise OSError(errno.EBADF if fd == 0x7FFFFFFF else errno.ENOTTY, "")
        row = find(kind, request)
        if row is None:
            raise OSError(getattr(errno, X86.unknown.get(kind, "ENOTTY")), "")
        if row.name == "CREATE_VM":
            self.model = Model(X86)
            return self._new("vm")
        if row.argument is not None and not 4096 <= argument < 1 << 47:
            raise OSError(errno.EFAULT, "")
        members = None
        if row.argument is not None:
            parsed = row.argument.parse(ctypes.string_at(argument, row.argument.size))
            members = {field.name: getattr(parsed, field.name) for field in row.argument.fields}
        op = Op("ioctl", (kind, 0), row.name, arg=argument, members=members)
        answer = self.model.expect(op)
        if row.name == self.wrong:
            answer = "ENOSPC"
        if answer:
            raise OSError(getattr(errno, answer), "")
        self.model.learn(op, Outcome())
        return self._new(MAKES[row.name]) if row.name in MAKES else 0

    def close(self, fd: int) -> None:
        self.kinds.pop(fd, None)  # before another thread can have the number
        os.close(fd)

    def run_page(self, vcpu: int) -> mmap.mmap:
        raise OSError(errno.ENODEV, "no guest runs here")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with Daemon() as daemon:
        yield daemon.endpoint


def test_kvmcore_agrees_with_itself(endpoint: str) -> None:
    grammar, executor, other = Grammar(4, guest=False, generic=True), Executor(endpoint), Executor(endpoint, apart=True)
    for index in range(25):
        assert compare(grammar.sequence(index), executor.start(), other.start()).finding is None
    executor.close()
    other.close()


def test_kvmcore_agrees_with_the_rules_of_x86_on_slots(endpoint: str) -> None:
    executor, kernel = Executor(endpoint), DevKvm(RulesKernel())
    map0 = Op("map", ("vm", 0))
    region = {"slot": 0, "guest_phys_addr": 0x80000000, "memory_size": 0x10000, "userspace_addr": {"map": 0}}
    slots = [
        map0,
        *(
            Op("ioctl", ("vm", 0), "SET_USER_MEMORY_REGION", members={**region, **change})
            for change in (
                {}, {"memory_size": 1}, {"slot": 1}, {"slot": 32765}, {"guest_phys_addr": 0x90000000},
                {"flags": MEM_LOG_DIRTY_PAGES}, {"memory_size": 0}, {"memory_size": 0}, {"slot": 1 << 16},
            )
        ),
    ]  # fmt: skip
    assert compare(slots, executor.start(), kernel.start()).finding is None
    kernel.close()
    executor.close()


def test_a_disagreement_is_a_finding(endpoint: str, tmp_path: Path) -> None:
    run = RealRun(RulesKernel(wrong="RESET_DIRTY_RINGS"), 1, tmp_path, Executor(endpoint))
    figures = run.run(60, lambda figures: None, most=60)
    run.close()
    texts = [path.read_text() for path in (tmp_path / "findings").glob("*RESET_DIRTY_RINGS*")]
    assert figures.findings
    assert texts
    assert "ENOSPC" in texts[0]


def test_the_real_kernel_is_reached_by_ioctl() -> None:
    linux = Linux("/dev/null")
    fd = linux.open()
    with pytest.raises(OSError, match="Inappropriate") as caught:
        linux.ioctl(fd, 0xAE00, 0)
    linux.close(fd)
    assert caught.value.errno == errno.ENOTTY


def test_generic_sequences_keep_to_generic_ioctls() -> None:
    names = {op.name for index in range(300) for op in Grammar(2, guest=False, generic=True).sequence(index) if op.name}
    assert names == GENERIC


def test_how_far_guest_addresses_go_is_the_hosts() -> None:
    """What a real KVM on x86 answered in a differential run, beyond its physical address width and below it."""
    far = {"slot": 3, "guest_phys_addr": 1 << 56, "memory_size": 4096, "userspace_addr": {"map": 0}}
    for members, ours, explained in ((far, "", True), (far, "EFAULT", True), (far | {"guest_phys_addr": 1 << 20}, "", False)):
        op = Op("ioctl", ("vm", 0), "SET_USER_MEMORY_REGION", members=members)
        here, there = Outcome(-1 if ours else 0, ours), Outcome(-1, "EINVAL")
        assert any(known.applies(op, here, there) for known in DIFFERENCES) == explained


def test_a_process_that_is_stopped_for_a_while_makes_its_vm_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux ends KVM_CREATE_VM with EINTR then; KVM_RUN's EINTR is its answer."""
    kernel = Linux()
    answers = [errno.EINTR, errno.EINTR, 0]

    def ioctl(fd: int, request: int, argument: int) -> int:
        number = answers.pop(0)
        ctypes.set_errno(number)
        return -1 if number else 7

    monkeypatch.setattr(kernel, "_ioctl", ioctl)
    assert kernel.ioctl(3, BY_NAME["CREATE_VM"].number, 0) == 7
    answers[:] = [errno.EINTR]
    with pytest.raises(InterruptedError):
        kernel.ioctl(3, BY_NAME["RUN"].number, 0)
