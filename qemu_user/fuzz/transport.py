"""Attacks below the level of requests: frames that are torn, repeated, oversized, foreign; clients that stop or race.

Each is a client of its own that misbehaves for some milliseconds, and then asks whether the server still serves
others. What a stranger's process does is in stranger.py. Deterministic by seed but for the operating system's timing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from random import Random

import zmq

from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_NAME
from protocol.channel import fd_passing, zmq_socket
from protocol.channel.zmq_socket import Curve
from protocol.client import Kvm
from protocol.client.link import shared_context
from protocol.codec import envelope
from protocol.codec import session as codec
from qemu_user.fuzz import visits
from qemu_user.fuzz.grammar import Grammar
from qemu_user.fuzz.wire import Gone, Hang, Wire

_API_VERSION = BY_NAME["GET_API_VERSION"].number
_SLICES = 120
"""Half seconds that a stranger's process may take."""


def attack(endpoint: str, seed: str, far: tuple[str, Curve] | None = None) -> str:
    """One attack; its name. `far`: where and with which keys the server is on tcp. Hang, Gone: it did not stand it."""
    rng = Random(seed)
    if far is not None and rng.random() < 0.1:
        with contextlib.suppress(KvmError, OSError, zmq.ZMQError):
            visits.far(*far, rng)
        serves(endpoint, "far")
        return "far"
    chosen = rng.choice(ATTACKS)
    kvm = Kvm.open(endpoint, name="attack")
    try:
        chosen(kvm, endpoint, rng)
    except (KvmError, OSError, zmq.ZMQError):
        pass  # refused, or hung up on: as it should be
    finally:
        kvm.close()
    serves(endpoint, chosen.__name__.strip("_"))
    return chosen.__name__.strip("_")


def serves(endpoint: str, after: str) -> None:
    """Hang or Gone unless a newcomer gets a session, a VM, and an answer."""
    try:
        kvm = Kvm.open(endpoint)
        wire = Wire(kvm.link)
        try:
            sequence, frame = wire.frame(kvm.number, _API_VERSION)
            wire.send(frame)
            reply = wire.wait(sequence)
            if reply is None or reply.ret != 12:
                raise Gone(f"after {after}: GET_API_VERSION is {reply}")
            vm = kvm.create_vm()
            vm.close()
        finally:
            wire.close()
            kvm.close()
    except Hang as error:
        raise Hang(f"after {after}: {error}") from error
    except (KvmError, OSError) as error:
        raise Gone(f"after {after}: {error}") from error


def _good(kvm: Kvm, wire: Wire) -> bytes:
    return wire.frame(kvm.number, _API_VERSION)[1]


def _broken_frames(kvm: Kvm, endpoint: str, rng: Random) -> None:
    """Truncated, bit-flipped, lengthened frames, other magics and versions, counts that do not add up."""
    wire = Wire(kvm.link)
    try:
        for _ in range(40):
            frame = bytearray(_good(kvm, wire))
            match rng.randrange(4):
                case 0:
                    del frame[rng.randrange(len(frame)) :]
                case 1:
                    frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
                case 2:
                    frame += rng.randbytes(rng.randrange(1, 200))
                case _:
                    at = rng.choice((0, 4, 6, 48, 50, 52))
                    frame[at : at + 2] = rng.randbytes(2)
            wire.send(bytes(frame))
        sequence, last = wire.frame(kvm.number, _API_VERSION)
        wire.send(last)
        wire.wait(sequence)
    finally:
        wire.close()


def _repeated(kvm: Kvm, endpoint: str, rng: Random) -> None:
    """The same frames again and in another order."""
    wire = Wire(kvm.link)
    try:
        frames = [wire.frame(kvm.number, rng.choice((_API_VERSION, BY_NAME["CHECK_EXTENSION"].number))) for _ in range(20)]
        for _, frame in rng.sample(frames * 3, 60):
            wire.send(frame)
        wire.wait(frames[0][0])
    finally:
        wire.close()


def _oversized(kvm: Kvm, endpoint: str, rng: Random) -> None:
    """Longer than the limit: the socket hangs up."""
    sock = zmq_socket.dealer(shared_context(), str(kvm.link.welcome["router"]))
    sock.send(bytes(envelope.MAX_FRAME + rng.randrange(1, 4096)))
    sock.poll(50)
    sock.close()


def _multipart(kvm: Kvm, endpoint: str, rng: Random) -> None:
    """Messages of several frames, and one that is never finished."""
    sock = zmq_socket.dealer(shared_context(), str(kvm.link.welcome["router"]))
    for _ in range(10):
        sock.send_multipart([rng.randbytes(rng.randrange(100)) for _ in range(rng.randrange(2, 20))])
    for _ in range(200):
        sock.send(bytes(4096), zmq.SNDMORE)
    sock.close()


def _chosen_identity(kvm: Kvm, endpoint: str, rng: Random) -> None:
    """Two sockets that claim one routing identity, and reserved ones."""
    sockets = []
    for identity in (b"same", b"same", b"x" * 255):
        sock: zmq.Socket[bytes] = shared_context().socket(zmq.DEALER)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.IDENTITY, identity)
        sock.connect(str(kvm.link.welcome["router"]))
        sockets.append(sock)
    wire = Wire(kvm.link)
    for sock in sockets:
        sock.send(_good(kvm, wire), zmq.NOBLOCK)
        sock.poll(20)
        sock.close()
    wire.close()


def _raw_zmtp(kvm: Kvm, endpoint: str, rng: Random) -> None:
    """Half a greeting, or no ZMTP at all, on the ROUTER's own socket."""
    path = str(kvm.link.welcome["router"]).removeprefix("ipc://")
    visitors = []
    for _ in range(8):
        visitor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        visitor.connect(path)
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL".ljust(55, b"\0")
        visitor.send(rng.choice((greeting[: rng.randrange(64)], greeting + rng.randbytes(100), rng.randbytes(64))) or b"\0")
        visitors.append(visitor)
    time.sleep(0.01)
    for visitor in visitors:
        visitor.close()


def _door(kvm: Kvm, endpoint: str, rng: Random) -> None:
    """Nonsense packets at the front door, descriptors where none belong, visitors who say nothing."""
    path = endpoint.removeprefix("ipc://")
    visitors = []
    for _ in range(16):
        visitor = fd_passing.connect(path)
        visitors.append(visitor)
        hello = codec.encode(
            codec.Message(
                codec.Op.HELLO, 1, body={"name": rng.choice(("x" * 65, "x", "\0", 7)), "compat": rng.choice(("strict", 3))}
            )
        )
        other = codec.encode(codec.Message(codec.Op.HELLO, 1))
        listed = other[:-8] + (2).to_bytes(4, "little") + other[-4:] + b"[]"  # a body that is no object
        packet = rng.choice(
            (hello, listed, hello[:4] + b"\x02" + hello[5:], hello[:-1], hello[:20], rng.randbytes(64),
             codec.encode(codec.Message(rng.randrange(9), 1)))
        )
        fd_passing.send(visitor, packet, [0] * rng.randrange(4), block=False)
    time.sleep(0.01)
    for visitor in visitors:
        visitor.close()


def _stolen(kvm: Kvm, endpoint: str, rng: Random) -> None:
    """Another process that knows our session's number; it must be told EIO."""
    router, welcome = str(kvm.link.welcome["router"]), kvm.link.welcome
    arguments = [router, str(welcome["session"]), str(kvm.link.incarnation), str(kvm.number)]
    command = [sys.executable, "-m", "qemu_user.fuzz.stranger", "steal", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as thief:
        said, complaint = _heard(thief)
    if said.strip() != b"EIO":
        raise Gone(f"another process could use our session: {said!r} {complaint[-200:]!r}")


def _heard(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """What it has said at its end. Hang: it does not end. Time counts in slices: a machine that stood still is no hang."""
    for _ in range(_SLICES):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=0.5)
    process.kill()
    raise Hang(f"another process that used our session got no answer in {_SLICES / 2:g} s")


def _stopped(kvm: Kvm, endpoint: str, rng: Random) -> None:
    """A client that floods, reads nothing, is stopped (not killed), and at last killed."""
    client = subprocess.Popen([sys.executable, "-m", "qemu_user.fuzz.stranger", "flood", endpoint], stdout=subprocess.PIPE)
    assert client.stdout is not None
    try:
        client.stdout.readline()
        os.kill(client.pid, signal.SIGSTOP)
        serves(endpoint, "a client was stopped")
    finally:
        client.kill()
        client.wait()
        client.stdout.close()


def _race(kvm: Kvm, endpoint: str, rng: Random) -> None:
    """Several threads with a connection each perform sequences on one VM."""
    from qemu_user.fuzz.executor import Executor, Sequence

    executor = Executor(endpoint)
    first = executor.start()
    grammar = Grammar(rng.getrandbits(32), guest=False)
    trouble: list[Exception] = []

    twins = [
        Sequence(executor, first.place, first.place.slot(), first.made["vm"][0], Wire(first.place.vm.link)) for _ in range(3)
    ]

    def work(index: int) -> None:
        twin = twins[index]
        twin.made = first.made
        try:
            for op in grammar.sequence(index):
                twin.perform(op)
        except (Hang, Gone) as error:
            trouble.append(error)
        finally:
            twin.release()

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first.close()
    executor.close()
    if trouble:
        raise trouble[0]


ATTACKS: tuple[Callable[[Kvm, str, Random], None], ...] = (
    _broken_frames, _repeated, _oversized, _multipart, _chosen_identity, _raw_zmtp, _door, _stolen, _stopped, _race,
    visits.frames, visits.wishes, visits.left_behind, visits.crowd,
)  # fmt: skip
