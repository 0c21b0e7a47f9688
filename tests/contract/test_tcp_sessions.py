"""Sessions over tcp: CURVE keys, a guest without shared memory, and what becomes of those who go."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from errno import EOPNOTSUPP
from pathlib import Path

import psutil
import pytest
import zmq.auth

from protocol.abi import run_page
from protocol.abi.errors import KvmError
from protocol.abi.exits import Exit
from protocol.abi.structs import MEM_GUEST_MEMFD
from protocol.abi.structs_riscv import CORE, one_reg
from protocol.channel import keys
from protocol.channel.zmq_socket import Curve
from protocol.client import Kvm
from protocol.codec import control
from tests.framework.asm import assemble
from tests.framework.full_stack import ROOT, Daemon

GPA, SIZE, DEVICE = 0x8000_0000, 1 << 20, 0x1000_0000

SOURCE = """
    li t0, 0x10000000
    lw t1, 8(t0)
    addi t1, t1, 1
    sw t1, 12(t0)
    la t2, word
    ld t3, 0(t2)
    sd t3, 16(t0)
1:  j 1b
    .balign 8
word: .dword 0x1122334455667788
"""


class Place:
    """A daemon on tcp, its keys in `folder`: ours is trusted, the stranger's is not."""

    def __init__(self, folder: Path) -> None:
        for name in ("host", "ours", "stranger"):
            zmq.auth.create_certificates(folder, name)
        peers = folder / "peers"
        peers.mkdir()
        (peers / "ours.key").write_bytes((folder / "ours.key").read_bytes())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self.folder = folder
        listen = ["--listen", self.endpoint, "--key", str(folder / "host.key_secret"), "--peers", str(peers)]
        self.daemon = Daemon(*listen, "--accel", "interpreter")

    def curve(self, name: str) -> Curve:
        own = keys.own(self.folder / f"{name}.key_secret")
        return Curve(own.public, own.secret, keys.public(self.folder / "host.key"))

    def open(self, name: str = "ours") -> Kvm:
        return Kvm.open(self.endpoint, name="far", curve=self.curve(name))

    def vm_processes(self) -> list[psutil.Process]:
        children = psutil.Process(self.daemon.process.pid).children(recursive=True)
        return [child for child in children if child.name().startswith("kvmcore-vm")]

    def wait_for_no_vm(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.vm_processes():
            assert time.monotonic() < end
            time.sleep(0.05)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("keys"))
    yield made
    made.daemon.close()


def test_a_guest_without_shared_memory(place: Place) -> None:
    kvm = place.open()
    assert kvm.api_version() == 12
    vm = kvm.create_vm()
    memfd = vm.create_guest_memfd(SIZE)
    with pytest.raises(KvmError) as caught:
        memfd.map()
    assert caught.value.errno == EOPNOTSUPP
    vm.set_user_memory_region2(0, GPA, SIZE, flags=MEM_GUEST_MEMFD, guest_memfd=memfd)
    image = assemble(SOURCE, GPA).image
    vm.write_gpa(GPA, image)
    assert vm.read_gpa(GPA, len(image)) == image
    vcpu = vm.create_vcpu(0)
    vcpu.set_one_reg(one_reg(CORE, 0), GPA)
    assert vcpu.run() == Exit.MMIO
    gpa, _, length, write = run_page.MMIO.unpack_from(vcpu.run_page, run_page.UNION)
    assert (gpa, length, write) == (DEVICE + 8, 4, 0)
    run_page.MMIO.pack_into(vcpu.run_page, run_page.UNION, gpa, (41).to_bytes(8, "little"), length, write)
    assert vcpu.run() == Exit.MMIO
    gpa, data, length, write = run_page.MMIO.unpack_from(vcpu.run_page, run_page.UNION)
    assert (gpa, int.from_bytes(data[:4], "little"), write) == (DEVICE + 12, 42, 1)
    assert vcpu.run() == Exit.MMIO
    gpa, data, length, write = run_page.MMIO.unpack_from(vcpu.run_page, run_page.UNION)
    assert (gpa, int.from_bytes(data, "little")) == (DEVICE + 16, 0x1122334455667788)
    vm.kick(vcpu)
    with pytest.raises(KvmError) as caught:
        vcpu.run()
    assert caught.value.name == "EINTR"
    with pytest.raises(KvmError) as caught:
        vm.irqfd(0, 1)
    assert caught.value.errno == EOPNOTSUPP
    vm.close()
    place.wait_for_no_vm(60)
    kvm.close()


def test_an_unknown_key_gets_nothing(place: Place) -> None:
    stranger = place.curve("stranger")
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.curve_serverkey, sock.curve_publickey, sock.curve_secretkey = stranger.server, stranger.public, stranger.secret
        sock.connect(place.endpoint)
        sock.send(b"anything")
        assert not sock.poll(1500)
    with pytest.raises(KvmError, match="does it know our key"):
        place.open("stranger")
    kvm = place.open()
    assert kvm.api_version() == 12
    kvm.close()


def test_without_encryption_nothing_comes_in(place: Place) -> None:
    host, port = place.endpoint.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as sock:
        sock.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48))
        sock.settimeout(60)
        while sock.recv(4096):  # libzmq's greeting, then the end
            pass


def test_two_clients_with_one_key_have_sessions_of_their_own(place: Place) -> None:
    first, second = place.open(), place.open()
    vm = first.create_vm()
    assert first.link.session != second.link.session
    with pytest.raises(KvmError) as caught:
        second.channel.request(vm.number, 0xAE03, 0, name="other's")
    assert caught.value.name in ("EBADF", "EINVAL", "ENOTTY")
    vm.close()
    first.close()
    second.close()
    place.wait_for_no_vm(60)


CLIENT = """
import sys, time
from pathlib import Path
from protocol.channel import keys
from protocol.channel.zmq_socket import Curve
from protocol.client import Kvm
folder = Path(sys.argv[2])
own = keys.own(folder / "ours.key_secret")
kvm = Kvm.open(sys.argv[1], name="lost", curve=Curve(own.public, own.secret, keys.public(folder / "host.key")))
vm = kvm.create_vm()
print("up", flush=True)
time.sleep(1000)
"""


@pytest.mark.slow
def test_a_killed_client_is_known_by_its_silence(place: Place) -> None:
    command = [sys.executable, "-c", CLIENT, place.endpoint, str(place.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\n"
        assert place.vm_processes()
        client.kill()
    place.wait_for_no_vm(control.LEASE_SECONDS + 60)


@pytest.mark.parametrize(
    ("listen", "said"),
    [
        (["tcp://127.0.0.1:0", "--peers", "/nowhere"], "nobody could connect"),
        (["tcp://127.0.0.1"], "tcp://ADDRESS:PORT"),
        (["udp://127.0.0.1:1"], "ipc:///path/to/socket"),
    ],
)
def test_wrong_command_lines(listen: list[str], said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvmcore", "--listen", f"ipc://{tmp_path}/s", "--listen", *listen]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert said in done.stderr


