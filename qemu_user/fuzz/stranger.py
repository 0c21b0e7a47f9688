"""Clients in processes of their own, for attacks that need one: `python -m qemu_user.fuzz.stranger steal|flood|leave ...`.

Started by transport.py; says what came of it on stdout.
"""

from __future__ import annotations

import json
import os
import sys
import time

from protocol.abi.ioctls import BY_NAME
from protocol.channel import zmq_socket
from protocol.client import Kvm
from protocol.codec import envelope
from protocol.codec.envelope import Request
from qemu_user.fuzz.executor import errno_name
from qemu_user.fuzz.wire import Wire


def steal(router: str, session: str, incarnation: str, handle: str) -> None:
    """Use a session that is another process's; print the errno."""
    sock = zmq_socket.dealer(zmq_socket.context(), router)
    request = Request(int(incarnation), bytes.fromhex(session), 1, int(handle), BY_NAME["GET_API_VERSION"].number, 0)
    sock.send(envelope.encode_request(request))
    print(errno_name(envelope.decode_reply(sock.recv()).errno) if sock.poll(10_000) else "silence", flush=True)


def flood(endpoint: str) -> None:
    """Send requests without reading replies; say so; go on until killed."""
    kvm = Kvm.open(endpoint, name="flood")
    vm = kvm.create_vm()
    wires = [(Wire(kvm.link), kvm.number), (Wire(vm.link), vm.number)]
    for round_number in range(1 << 20):
        for wire, number in wires:
            _, frame = wire.frame(number, BY_NAME["CHECK_EXTENSION"].number, 1)
            try:
                wire.send(frame)
            except Exception:
                time.sleep(0.01)
        if round_number == 50:
            print("flooding", flush=True)


def leave(endpoint: str) -> None:
    """Make a VM that outlives us; say how it can be had; wait to be killed."""
    kvm = Kvm.open(endpoint, name="left")
    vm = kvm.create_vm()
    vm.create_vcpu(0)
    left = os.memfd_create("left")
    vm.keep(7, left)
    vm.outlive(True)
    link = vm.link
    how = {"door": vm.door, "session": link.session.hex(), "incarnation": link.incarnation, "vm": vm.number, "pid": vm.pid}
    print(json.dumps(how), flush=True)
    time.sleep(60)


if __name__ == "__main__":
    if sys.argv[1] == "steal":
        steal(*sys.argv[2:])
    elif sys.argv[1] == "leave":
        leave(sys.argv[2])
    else:
        flood(sys.argv[2])
    sys.stdout.flush()
    os._exit(0)
