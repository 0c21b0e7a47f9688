"""A VM that outlives its client, as kvmcore's session sees it: who may attach, what is kept, what goes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from protocol.abi.errors import KvmError
from protocol.client import Kvm, Vcpu, Vm
from tests.framework.full_stack import ROOT, Daemon

CLIENT = """
import json, os, sys, time
from protocol.client import Kvm
kvm = Kvm.open(sys.argv[1], name="kept")
vm = kvm.create_vm()
vcpu = vm.create_vcpu(0)
vcpu.set_one_reg(0x8030000002000000 | 10, 0x1234)
left = os.memfd_create("left"); os.write(left, b"for the next one")
vm.keep(7, left); vm.keep(8, left); vm.keep(8, -1)
if sys.argv[2] == "outlive":
    vm.outlive(True)
elif sys.argv[2] != "not":
    vm.outlive(True, os.open(sys.argv[2], os.O_RDONLY), ["yes", "perhaps"])
link = vm.link
print(json.dumps(dict(door=vm.door, session=link.session.hex(), incarnation=link.incarnation, vm=vm.number,
                      vcpu=vcpu.number, pid=vm.pid)), flush=True)
command = sys.stdin.readline()
if command == "close\\n":
    vm.close()
time.sleep(60)
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with Daemon() as daemon:
        yield daemon.endpoint


class Client:
    """A process with a VM."""

    def __init__(self, endpoint: str, mode: str) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", CLIENT, endpoint, mode]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT, text=True)
        assert self.process.stdout is not None
        self.how: dict[str, Any] = json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def attach(self, **other: Any) -> Vm:
        how = {**self.how, **other}
        end = time.monotonic() + 60
        while True:
            try:
                return Kvm.attach_vm(how["door"], bytes.fromhex(how["session"]), how["incarnation"], how["vm"], how["pid"])
            except KvmError as error:
                if error.errno != errno.EBUSY or time.monotonic() > end:
                    raise
                time.sleep(0.02)


def gone(pid: int) -> bool:
    end = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_another_process_takes_over(endpoint: str) -> None:
    client = Client(endpoint, "outlive")
    client.kill()
    vm = client.attach()
    vcpu = Vcpu(vm.link, vm.channel, client.how["vcpu"], 0)
    assert vcpu.get_one_reg(0x8030000002000000 | 10) == 0x1234
    fd = vm.kept(7)
    assert os.pread(fd, 100, 0) == b"for the next one"
    os.close(fd)
    assert vm.kept(8) == vm.kept(99) == -1
    with pytest.raises(KvmError) as caught:
        Kvm.attach_vm(client.how["door"], bytes.fromhex(client.how["session"]), 0, vm.number, vm.pid)
    assert caught.value.errno == errno.EBUSY
    vm.leave()  # as if we had died: it waits again
    vm = client.attach()
    vm.close()
    assert gone(client.how["pid"])


def test_only_who_knows_the_session(endpoint: str) -> None:
    client = Client(endpoint, "outlive")
    client.kill()
    with pytest.raises(KvmError) as caught:
        client.attach(session="00" * 16)
    assert caught.value.errno == errno.EPERM
    client.attach().close()
    assert gone(client.how["pid"])


def test_a_living_client_is_not_robbed(endpoint: str) -> None:
    client = Client(endpoint, "outlive")
    how = client.how
    with pytest.raises(KvmError) as caught:
        Kvm.attach_vm(how["door"], bytes.fromhex(how["session"]), how["incarnation"], how["vm"], how["pid"])
    assert caught.value.errno == errno.EBUSY
    assert client.process.stdin is not None
    client.process.stdin.write("close\n")
    client.process.stdin.flush()
    assert gone(how["pid"]), "close() ends a VM that would outlive a death"
    client.kill()


@pytest.mark.parametrize(("word", "lives"), [("yes", True), ("perhaps not", True), ("no", False), ("", False)])
def test_what_a_file_says_at_its_death_decides(word: str, lives: bool, endpoint: str, tmp_path: Path) -> None:
    file = tmp_path / "word"
    file.write_text("yes" if not lives else "no")
    client = Client(endpoint, str(file))
    file.write_text(word)
    client.kill()
    if lives:
        client.attach().close()
    assert gone(client.how["pid"])


def test_conditions_that_are_none(endpoint: str, tmp_path: Path) -> None:
    kvm = Kvm.open(endpoint)
    vm = kvm.create_vm()
    (tmp_path / "word").write_text("yes")
    file, folder = os.open(tmp_path / "word", os.O_RDONLY), os.open(tmp_path, os.O_RDONLY)
    for on, fd, words in ((True, folder, ["yes"]), (False, file, ["yes"]), (True, file, [""]), (True, file, ["\ud800"])):
        with pytest.raises(KvmError) as caught:
            vm.outlive(on, fd, words)
        assert caught.value.errno == errno.EINVAL
    vm.outlive(True, file, ["yes"])
    vm.outlive(False)
    vm.close()
    kvm.close()
    os.close(file)
    os.close(folder)


def test_others_die_with_their_client(endpoint: str) -> None:
    client = Client(endpoint, "not")
    client.kill()
    assert gone(client.how["pid"])
