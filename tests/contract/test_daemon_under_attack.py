"""What strangers and broken clients do to a daemon: others go on, nothing is left, every answer is an errno."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from kvmcore.server.quotas import Quotas
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_NAME
from protocol.channel import fd_passing
from protocol.client import Kvm
from protocol.codec import control
from protocol.codec import session as codec
from protocol.codec.session import Message, Op
from qemu_user.fuzz.wire import Wire
from tests.framework.full_stack import ROOT, Daemon


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon("--accel", "interpreter") as running:
        yield running


def connect(daemon: Daemon) -> socket.socket:
    return fd_passing.connect(daemon.endpoint.removeprefix("ipc://"))


def serves(daemon: Daemon) -> bool:
    kvm = Kvm.open(daemon.endpoint)
    try:
        vm = kvm.create_vm()
        assert vm.create_vcpu(0).get_mp_state() == 0
        vm.close()
        return kvm.api_version() == 12
    finally:
        kvm.close()


def test_torn_and_foreign_packets_end_their_own_connection(daemon: Daemon) -> None:
    hello = codec.encode(Message(Op.HELLO, 1))
    for packet in (b"x", hello[:-1], hello + b"x", b"\xff" * 4096, codec.encode(Message(99, 1)), bytes(8192)):
        with connect(daemon) as sock:
            sock.send(packet)
            sock.settimeout(60)
            assert sock.recv(8192) == b""
    assert serves(daemon)


def test_hello_that_asks_for_nonsense(daemon: Daemon) -> None:
    for body in ({"compat": "warp"}, {"name": 7}, {"name": "x" * 100}, {"accel": "warp"}, {"accel": 3}):
        with connect(daemon) as sock:
            sock.send(codec.encode(Message(Op.HELLO, 1, body=body)))
            sock.settimeout(60)
            answer = codec.decode(sock.recv(8192))
            assert answer.errno == 22
            assert answer.body["reason"]
    assert serves(daemon)


def test_descriptors_of_the_daemon_run_out() -> None:
    """A process that may have 256 descriptors, and a crowd of connections: refused, and served again afterwards."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Daemon("--accel", "interpreter") as daemon:
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (256, hard))
        crowd = []
        for _ in range(600):
            try:
                crowd.append(connect(daemon))
            except OSError:
                break
        time.sleep(0.5)
        assert daemon.process.poll() is None
        for sock in crowd:
            sock.close()
        end = time.monotonic() + 60
        while True:
            try:
                assert serves(daemon)
                return
            except KvmError:
                assert time.monotonic() < end
                time.sleep(0.2)


def crowd_at(path: str, most: int) -> list[socket.socket]:
    """Connections to a Unix socket until one is refused, `most` at the most."""
    crowd = []
    for _ in range(most):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            break
        crowd.append(sock)
    return crowd


def test_a_crowd_at_the_router() -> None:
    """libzmq aborts a process that has no descriptor for an ipc connection: so many are never let in."""
    with Daemon("--accel", "interpreter", descriptors=4096) as daemon:
        kvm = Kvm.open(daemon.endpoint)
        vm = kvm.create_vm()
        for link in (kvm.link, vm.link):
            path = str(link.welcome["router"]).removeprefix("ipc://")
            crowd = crowd_at(path, 5000)
            assert 400 < len(crowd) < 4096
            assert kvm.api_version() == 12, "those who are in are served"
            assert vm.check_extension(1) >= 0
            for sock in crowd:
                sock.close()
        end = time.monotonic() + 60
        while True:
            try:
                assert serves(daemon)
                break
            except KvmError:
                assert time.monotonic() < end
                time.sleep(0.2)
        vm.create_vcpu(0).close()
        vm.close()
        kvm.close()


def test_a_crowd_while_the_io_thread_is_busy() -> None:
    """Few descriptors, and nobody looks at the loop: a thread of its own has seen to it."""
    with Daemon("--accel", "interpreter", descriptors=1024) as daemon:
        kvm = Kvm.open(daemon.endpoint)
        vm = kvm.create_vm()
        memory = vm.create_guest_memfd(1 << 16)
        vm.set_user_memory_region2(0, 0x80000000, 1 << 16, 0, 4, memory)
        path = str(vm.link.welcome["router"]).removeprefix("ipc://")
        wires = Wire(vm.link)
        work = [wires.frame(vm.number, control.READ_GPA, 0x80000000, payload=control.LENGTH.pack(1 << 16)) for _ in range(200)]
        wires.batch([frame for _, frame in work])
        crowd = crowd_at(path, 2000)
        assert 100 < len(crowd) < 1000
        assert vm.check_extension(1) >= 0
        wires.close()
        for sock in crowd:
            sock.close()
        vm.close()
        kvm.close()


def test_descriptors_that_clients_pass_leave_some_for_others() -> None:
    with Daemon("--accel", "interpreter", descriptors=1024) as daemon:
        kvm = Kvm.open(daemon.endpoint)
        event = os.eventfd(0)
        refused = {}
        for number in range(600):
            try:
                kvm.link.say(Op.PASS_FILE, "pass", number, fds=[event])
            except KvmError as error:
                refused[number] = error.name
        assert set(refused.values()) == {"EMFILE"}
        assert 100 < min(refused) < 600
        assert serves(daemon)
        kvm.close()
        os.close(event)


def test_a_session_that_asks_too_much_is_kept_waiting(daemon: Daemon) -> None:
    greedy, other = Kvm.open(daemon.endpoint), Kvm.open(daemon.endpoint)
    wire = Wire(greedy.link)
    errnos = set()
    version = BY_NAME["GET_API_VERSION"].number
    begin = time.monotonic()
    for _ in range(100):
        frames = [wire.frame(greedy.number, version) for _ in range(250)]
        wire.batch([frame for _, frame in frames])
        errnos |= {reply.errno for sequence, _ in frames if (reply := wire.wait(sequence))}
        assert other.api_version() == 12
    assert errnos == {0}
    assert Quotas.rate * (time.monotonic() - begin + 1) + 250 >= 100 * 250  # a second's worth is there at the start
    assert greedy.api_version() == 12
    wire.close()
    greedy.close()
    other.close()


def test_stale_and_foreign_handles(daemon: Daemon) -> None:
    first, second = Kvm.open(daemon.endpoint), Kvm.open(daemon.endpoint)
    vm = first.create_vm()
    vcpu = vm.create_vcpu(0)
    vcpu.close()
    with pytest.raises(KvmError) as caught:
        vcpu.get_mp_state()
    assert caught.value.name == "EBADF"
    for number in (0, 1, vm.number ^ 1, 0xFFFFFFFF):
        with pytest.raises(KvmError) as caught:
            vm.channel.request(number, BY_NAME["GET_API_VERSION"].number, 0, name="foreign")
        assert caught.value.name in ("EBADF", "EINVAL", "ENOTTY")
    stolen = first.link.session
    second.link.session = stolen  # knowing another one's session does not help
    with pytest.raises(KvmError):
        second.link.channel().request(vm.number, BY_NAME["GET_API_VERSION"].number, 0, name="stolen")
    second.link.incarnation ^= 1
    with pytest.raises(KvmError) as caught:
        second.link.channel().request(first.number, BY_NAME["GET_API_VERSION"].number, 0, name="stale")
    assert caught.value.name == "ESTALE"
    vm.close()
    assert serves(daemon)


CLIENT = """
import sys, time
from protocol.client import Kvm
kvm = Kvm.open(sys.argv[1], name="victim")
vm = kvm.create_vm()
memfd = vm.create_guest_memfd(1 << 20)
vcpus = [vm.create_vcpu(i) for i in range(2)]
print("up", flush=True)
time.sleep(1000)
"""


def victims(daemon: Daemon) -> list[psutil.Process]:
    """The VM processes of CLIENT (others may be on their way out)."""
    found = []
    for child in psutil.Process(daemon.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name().startswith("kvmcore-vm vic"):
                found.append(child)
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_client_that_dies_or_stands_still(daemon: Daemon, how: signal.Signals) -> None:
    client = subprocess.Popen([sys.executable, "-c", CLIENT, daemon.endpoint], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\n"
        assert len(victims(daemon)) == 1
        os.kill(client.pid, how)
        assert serves(daemon)
        if how == signal.SIGSTOP:
            assert len(victims(daemon)) == 1, "one that stands still may go on"
    finally:
        client.kill()
        client.wait()
    end = time.monotonic() + 60
    while victims(daemon):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_unsealed_memory_is_refused(daemon: Daemon) -> None:
    kvm = Kvm.open(daemon.endpoint)
    vm = kvm.create_vm()
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, 1 << 20)
    with pytest.raises(KvmError) as caught:
        vm.map_segment(0x10000000, 1 << 20, fd)
    assert caught.value.name == "EINVAL"
    assert "sealed" in caught.value.reason
    os.close(fd)
    vm.close()
    kvm.close()


def test_a_host_without_memory(daemon: Daemon) -> None:
    """ENOMEM for what it was for, nothing else happens, and later there is enough again."""
    kvm = Kvm.open(daemon.endpoint)
    vm = kvm.create_vm()
    vm.create_vcpu(0)
    size = psutil.Process(vm.pid).memory_info().vms
    resource.prlimit(vm.pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    refused = []
    for number in range(1, 40):
        try:
            vm.ioctl("CREATE_VCPU", number)
        except KvmError as error:
            refused.append((error.name, error.reason))
    assert refused
    assert {name for name, _ in refused} == {"ENOMEM"}, refused
    assert not [reason for _, reason in refused if "internal" in reason]
    assert vm.check_extension(1) >= 0
    resource.prlimit(vm.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    vm.ioctl("CREATE_VCPU", 100)
    vm.close()
    kvm.close()
