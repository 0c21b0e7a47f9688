"""Attacks by clients that are nearly right: they come by another door, leave a VM behind, or ask for what is not to be had.

As those of transport.py, which has their list; split off because these speak the protocol.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from errno import EIO
from random import Random

import zmq

from protocol.abi import structs_riscv as riscv
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_NAME
from protocol.channel import fd_passing, zmq_socket
from protocol.channel.zmq_socket import Curve
from protocol.client import Kvm
from protocol.client.link import shared_context
from protocol.codec import control, envelope
from protocol.codec import session as codec
from protocol.codec.envelope import Request
from qemu_user.fuzz.wire import Wire


def frames(kvm: Kvm, endpoint: str, rng: Random) -> None:
    """Requests whose header or copies do not add up, each in one way; batches of them; numbers of another incarnation."""
    wire = Wire(kvm.link)
    incarnation, session = kvm.link.incarnation, kvm.link.session
    good = Request(incarnation, session, 1, kvm.number, BY_NAME["GET_API_VERSION"].number, 0)
    copy = envelope.Copy(0x1000, 8, envelope.COPY_IN, bytes(8))
    try:
        bad = [
            replace_copy(good, copy._replace(direction=0)), replace_copy(good, copy._replace(direction=7)),
            replace_copy(good, copy._replace(va=(1 << 64) - 1)),
            replace_copy(good, envelope.Copy(0, envelope.MAX_FRAME, envelope.COPY_OUT, b"")),
            good._replace(incarnation=incarnation ^ 1), good._replace(session=bytes(16)), good._replace(handle=0xFFFFFFFF),
            good._replace(request=control.BATCH, payload=rng.randbytes(9)),
            good._replace(request=control.BATCH, payload=bytes(1028)),
            good._replace(request=control.BATCH, session=bytes(16), payload=bytes(12)), good._replace(request=control.HELLO),
            good._replace(request=control.READ, payload=bytes(3)), good._replace(request=control.CLOSE_VM),
            good._replace(request=control.KICK), good._replace(request=control.GET_STATE), good._replace(request=control.DUP),
            good._replace(request=control.READ, payload=control.LENGTH.pack(1 << 31)), good._replace(request=control.PING),
            good._replace(request=0xFFFFAF), good._replace(request=control.SET_STATE, payload=bytes(16 * 9000)),
            good._replace(request=control.MAP), good._replace(request=control.MAP, payload=control.SEGMENT.pack(4096, 0, 3)),
        ]  # fmt: skip
        encoded = []
        for number, request in enumerate(rng.sample(bad, 12)):
            with contextlib.suppress(envelope.FrameError):
                encoded.append(envelope.encode_request(request._replace(seq=1000 + number)))
        count = rng.choice((2, 65, 200))
        head = bytearray(envelope.encode_request(good))
        head[56:58] = count.to_bytes(2, "little")
        encoded.append(bytes(head))
        for frame in encoded:
            wire.send(frame)
        wire.batch([*encoded, *encoded])
        sequence, last = wire.frame(kvm.number, BY_NAME["GET_API_VERSION"].number)
        wire.send(last)
        wire.wait(sequence)
    finally:
        wire.close()


def replace_copy(request: Request, copy: envelope.Copy) -> Request:
    """The request with this one pointee."""
    return request._replace(copies=(copy,))


def wishes(kvm: Kvm, endpoint: str, rng: Random) -> None:
    """Hellos that ask for what there is not; a VM's door visited by others, without a session's number and with it."""
    path = endpoint.removeprefix("ipc://")
    vm = kvm.create_vm()
    mine = kvm.link.session.hex()
    bodies: list[tuple[str, dict[str, object]]] = [
        (path, {"accel": "warp"}), (path, {"name": "x" * 65}), (path, {"name": 7}), (path, {"together": 7}),
        (path, {"compat": "9"}),
        (path, {"compat": rng.choice(("strict", "7.2", "6.12")), "accel": rng.choice(("reference", "translator"))}),
        (vm.door, {}), (vm.door, {"session": mine}), (vm.door, {"session": mine, "attach": True}), (vm.door, {"attach": True}),
    ]  # fmt: skip
    for where, body in rng.sample(bodies, len(bodies)):
        visitor = fd_passing.connect(where)
        with visitor:
            fd_passing.send(visitor, codec.encode(codec.Message(codec.Op.HELLO, 1, body=body)), None)
            visitor.settimeout(5)
            visitor.recv(codec.MAX_MESSAGE)
    visitor = fd_passing.connect(path)
    with visitor:
        fd_passing.send(visitor, codec.encode(codec.Message(codec.Op.SHARE, 1)), None)  # before its hello
        visitor.settimeout(5)
        visitor.recv(codec.MAX_MESSAGE)
    vm.close()


def left_behind(kvm: Kvm, endpoint: str, rng: Random) -> None:
    """A client leaves a VM that outlives it, and dies; strangers knock; we attach, use it, and are knocked at again."""
    command = [sys.executable, "-m", "qemu_user.fuzz.stranger", "leave", endpoint]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    try:
        how = json.loads(client.stdout.readline())
        session = bytes.fromhex(how["session"])
        with contextlib.suppress(KvmError):
            Kvm.attach_vm(how["door"], session, how["incarnation"], how["vm"], how["pid"]).close()  # it has its client
        client.send_signal(signal.SIGKILL)
        client.wait()
        with contextlib.suppress(KvmError):
            Kvm.attach_vm(how["door"], bytes(16), how["incarnation"], how["vm"], how["pid"])
        vm = None
        for _ in range(400):
            with contextlib.suppress(KvmError):
                vm = Kvm.attach_vm(how["door"], session, how["incarnation"], how["vm"], how["pid"])
                break
            time.sleep(0.02)
        if vm is None:
            raise KvmError(EIO, "attach", "the VM that was left cannot be had")
        for key in (7, 9):
            if (fd := vm.kept(key)) >= 0:
                os.close(fd)
        fd = os.memfd_create("kept")
        for key in (7, *range(100, 100 + rng.choice((1, 70)))):
            with contextlib.suppress(KvmError):
                vm.keep(key, fd)
        vm.keep(7, -1)
        os.close(fd)
        vm.check_extension(1)
        vm.outlive(False)
        if rng.random() < 0.5:
            vm.close()
        else:
            vm.link.close()
    finally:
        client.kill()
        client.wait()
        client.stdout.close()


def crowd(kvm: Kvm, endpoint: str, rng: Random) -> None:
    """More VMs and handles than a session may have, in one process and in processes of their own."""
    ours = Kvm.open(endpoint, name="crowd", together=True)
    try:
        first = ours.create_vm()
        wire = Wire(first.link)
        create = BY_NAME["CREATE_VM"].number
        made = [wire.frame(ours.shared_number or 0, create) for _ in range(256)]
        wire.batch([frame for _, frame in made])
        for sequence, _ in made:
            wire.wait(sequence)
        for _ in range(2):
            stats = [wire.frame(first.number, BY_NAME["GET_STATS_FD"].number) for _ in range(250)]
            wire.batch([frame for _, frame in stats])
            for sequence, _ in stats:
                wire.wait(sequence)
        wire.close()
    finally:
        ours.close()


def far(endpoint: str, curve: Curve, rng: Random) -> None:
    """Over tcp: a stranger's key, hellos that are no JSON, a client that says goodbye and one that only goes."""
    own = Curve.generate(curve.server)
    for key, payload in ((own, b"{}"), (curve, b"{"), (curve, b"[]"), (curve, json.dumps({"accel": "warp"}).encode())):
        sock = zmq_socket.dealer(shared_context(), endpoint, replace(key, server=curve.server))
        try:
            if sock.poll(300, zmq.POLLOUT):
                sock.send(envelope.encode_request(Request(0, bytes(16), 1, 0, control.HELLO, 0, payload=payload)))
                sock.poll(300)
        finally:
            sock.close()
    kvm = Kvm.open(endpoint, name="far", curve=curve)
    try:
        vm = kvm.create_vm()
        memory = vm.create_guest_memfd(1 << 16)
        vm.set_user_memory_region2(0, 0x80000000, 1 << 16, flags=4, guest_memfd=memory)
        vm.write_gpa(0x80000000, (0x00002023).to_bytes(4, "little"))
        vcpu = vm.create_vcpu(0)
        vcpu.set_one_reg(riscv.PC, 0x80000000)
        vcpu.run()
        vm.read_gpa(0x80000000, 16)
        for name in ("IRQFD", "IOEVENTFD"):
            with contextlib.suppress(KvmError):
                vm.call(name, fd=3)
        if rng.random() < 0.5:
            vm.close()
        else:
            vm.link.close()
    finally:
        kvm.close()
