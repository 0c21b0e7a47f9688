"""A host that takes VMs in: `softkvm host serve`. Listens, and has a process made for each VM that comes (arrival.py).

ipc://PATH: who may connect is who may enter the socket's directory; the connection is given to the VM's process. tcp://:
CURVE, known keys only; the caller is told where the VM's process listens. This process holds no VM: it may end at any
time.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from protocol.channel import fd_passing, zmq_socket
from protocol.channel.zmq_socket import Curve
from qemu_user.backends.errors import BackendError
from qemu_user.backends.unix_address import listen_unix
from qemu_user.cli.daemon import DaemonError, hold
from qemu_user.migration.spawn import Newcomer, SpawnError
from qemu_user.warm.process import WarmProcess

_PAUSE_SECONDS = 2.0
DOMAIN = "kvmcore"
"""ZAP domain that zmq_socket.router() sets."""


class HostError(Exception):
    """It cannot listen; the text is for the user."""


class KnownKeys:
    """ZAP: the public keys (Z85) that may connect."""

    def __init__(self, keys: list[bytes]) -> None:
        self._keys = set(keys)

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self._keys


def authenticated(keys: list[bytes]) -> tuple[zmq.Context[zmq.Socket[bytes]], ThreadAuthenticator]:
    """A context whose CURVE servers admit these keys only."""
    context = zmq_socket.context()
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(domain=DOMAIN, credentials_provider=KnownKeys(keys))
    return context, authenticator


class Host:
    """serve() until stop(). `endpoint`: the kvmcore daemon that VMs get ("": this user's);
    `disks`: folder for disks that travel along."""

    def __init__(
        self, listen: str, endpoint: str, disks: str = "", key: Curve | None = None, peers: list[bytes] | None = None
    ) -> None:
        """HostError."""
        self.listen, self._endpoint, self._disks = listen, endpoint, disks
        self._key, self._peers = key, peers or []
        self._stop, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._count = 0
        self._processes: list[WarmProcess | subprocess.Popen[bytes]] = []
        self._waiting: Newcomer | None = None
        self._daemon: socket.socket | None = None
        """Keeps a daemon ready for the next VM, if it is to be this user's."""
        self._due = 0.0
        """When another one is to be made, if none waits."""
        scheme, _, address = listen.partition("://")
        self._unix: socket.socket | None = None
        self._router: zmq.Socket[bytes] | None = None
        try:
            if scheme == "ipc":
                self._unix = listen_unix(address, "migration socket")
            elif scheme == "tcp" and key is not None:
                self._address = address.rpartition(":")[0]
                context, self._authenticator = authenticated(self._peers)
                self._router = zmq_socket.router(context, listen, key)
                self.listen = zmq_socket.bound_to(self._router)
            else:
                raise HostError(f"{listen}: expected ipc://PATH or tcp://ADDRESS:PORT")
        except (BackendError, OSError, zmq.ZMQError) as error:
            raise HostError(f"cannot listen on {listen}: {error}") from error

    def serve(self) -> None:
        """Take VMs until stop()."""
        if self._unix is not None:
            self._serve_unix(self._unix)
        elif self._router is not None:
            self._serve_tcp(self._router)

    def stop(self) -> None:
        """Any thread, signal handlers too."""
        os.write(self._wake, b"x")

    def close(self) -> None:
        """Listen no more."""
        if self._daemon is not None:
            self._daemon.close()
        if self._waiting is not None:
            self._waiting.forget()
            self._waiting.process.wait()
        if self._unix is not None:
            self._unix.close()
            os.unlink(self.listen.removeprefix("ipc://"))
        if self._router is not None:
            self._router.close()
            self._authenticator.stop()

    def _next(self) -> Newcomer:
        """The process that has waited; those that have ended are reaped. Another one takes its place, but not at once: a VM
        that is moved needs the cores more."""
        newcomer = self._waiting
        if newcomer is None or newcomer.process.poll() is not None:
            newcomer = self._make()
        self._waiting, self._due = None, time.monotonic() + _PAUSE_SECONDS
        self._processes = [process for process in self._processes if process.poll() is None] + [newcomer.process]
        return newcomer

    def _pause(self) -> int | None:
        """Milliseconds that may be waited for the next VM, as poll() has it; a process that is due is made."""
        if self._waiting is not None:
            return None
        left = self._due - time.monotonic()
        if left <= 0:
            self._waiting = self._make()
            self._hold_daemon()
            return None
        return int(1000 * left) + 1

    def _hold_daemon(self) -> None:
        """A VM that comes need not wait until one has started. After each VM anew: there may be one of another version now."""
        if self._endpoint:
            return
        before, self._daemon = self._daemon, None
        try:
            self._daemon = hold()
        except DaemonError as error:
            _log(str(error))  # the VM's process will say so to its source
        if before is not None:
            before.close()

    def _make(self) -> Newcomer:
        self._count += 1
        return Newcomer(f"incoming-{os.getpid()}-{self._count}")

    def _order(self, **more: Any) -> bytes:
        return json.dumps({"type": "TakeIn", "endpoint": self._endpoint, "disks": self._disks, **more}).encode()

    def _serve_unix(self, listener: socket.socket) -> None:
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while self._stop not in (ready := dict(poll.poll(self._pause()))):
            if not ready:
                continue
            connection, _ = listener.accept()
            with connection:
                if fd_passing.credentials(connection).uid in (0, os.geteuid()):
                    try:
                        newcomer = self._next()
                        newcomer.order(self._order(called=True), [connection.fileno()])
                        newcomer.forget()
                    except OSError as error:
                        _log(f"no process for a VM: {error}")

    def _serve_tcp(self, router: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(router, zmq.POLLIN)
        poller.register(self._stop, zmq.POLLIN)
        while self._stop not in (ready := dict(poller.poll(self._pause()))):
            if not ready:
                continue
            try:
                received = zmq_socket.receive_from(router)
            except zmq.Again:
                continue
            if received is not None:
                identity, frame = received
                zmq_socket.send_to(router, identity.bytes, self._answer(zmq_socket.peer_key(frame)))

    def _answer(self, peer: str) -> bytes:
        assert self._key is not None
        order = self._order(
            listen=f"tcp://{self._address}:*", public=self._key.public.decode(), secret=self._key.secret.decode(), peer=peer
        )
        try:
            newcomer = self._next()
            newcomer.order(order)
            word = newcomer.hear()
        except (SpawnError, OSError) as error:
            _log(f"no process for a VM: {error}")
            return json.dumps({"error": str(error)}).encode()
        return json.dumps({"port": word["port"]}).encode()


def _log(sentence: str) -> None:
    sys.stderr.write(f"softkvm host: {sentence}\n")
    sys.stderr.flush()


def default_listen(runtime: Path) -> str:
    """Where a host listens that was not told."""
    return f"ipc://{runtime / 'migrate.sock'}"


def decode_reply(data: bytes) -> dict[str, Any]:
    """The host's answer to a caller on tcp. HostError when it refuses."""
    try:
        reply = msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise HostError("the host's answer makes no sense") from error
    if "error" in reply:
        raise HostError(str(reply["error"]))
    return reply
