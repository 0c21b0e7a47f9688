"""A session with one kvmcore process: its Unix socket, its ROUTER, requests and their replies.

Used by the handles (kvm.py, vm.py, vcpu.py, device.py). A Link belongs to a server process; a Channel is one
DEALER of it, for one request at a time. Whoever may be kept waiting behind a KVM_RUN has a Channel of its
own. Must never wait for a dead server: replies are awaited in slices, with a look at the session's socket in
between.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from errno import ECONNREFUSED, ECONNRESET, EINVAL, EIO, ENOENT, EPROTO
from typing import Any

import zmq

from protocol.abi.errors import KvmError
from protocol.channel import fd_passing, zmq_socket
from protocol.channel.vdso import Vdso
from protocol.channel.zmq_socket import Curve
from protocol.codec import control, envelope
from protocol.codec import session as session_codec
from protocol.codec.envelope import Copy, Reply, Request
from protocol.codec.session import Message, Op
from protocol.version import fingerprint

_LOOK_MS = 1000
_PASSED_AT_ONCE = 32
"""Descriptors on their way that the socket has room for."""
_HELLOS = 3
"""How often we say hello to who hangs up: one of us may have stood still for so long that the other lost patience."""
_LAST_WORD_MS = 20
"""How long the reply of a process that has ended may still be on its way."""
_VERSION = fingerprint()
"""When this process was started: its code may be replaced on the disk meanwhile."""
_context: list[zmq.Context[zmq.Socket[bytes]]] = []
_context_pid = [0]
_context_lock = threading.Lock()


def shared_context() -> zmq.Context[zmq.Socket[bytes]]:
    """This process's ZeroMQ context, made on first use (in a forked child: a new one)."""
    with _context_lock:
        if not _context or _context_pid[0] != os.getpid():
            _context[:] = [zmq_socket.context()]
            _context_pid[0] = os.getpid()
        return _context[0]


def end_context() -> None:
    """No link is open any more: the context's threads end, and the process may fork."""
    with _context_lock:
        for context in _context:
            context.term()
        _context.clear()


_process = [os.getpid()]
"""Asked in every KVM_RUN, so without a system call."""


def _forked() -> None:
    _process[0] = os.getpid()


os.register_at_fork(after_in_child=_forked)


class Channel:
    """One DEALER, one request at a time."""

    def __init__(self, link: Link, endpoint: str, curve: Curve | None = None) -> None:
        self._link, self._endpoint, self._curve = link, endpoint, curve
        self._socket: zmq.Socket[bytes] | None = None
        self._poller = zmq.Poller()
        self._lock = threading.Lock()
        self._sequence = itertools.count(1)

    def request(
        self,
        handle: int,
        number: int,
        arg: int = 0,
        *,
        name: str = "",
        copies: tuple[Copy, ...] = (),
        payload: bytes = b"",
        flags: int = 0,
    ) -> Reply:
        """The reply to a request. KvmError: the errno that came back, or ECONNRESET when the server is
        gone.
        """
        self._link.check_owner(name)
        with self._lock:
            sequence = next(self._sequence)
            request = Request(
                self._link.incarnation,
                self._link.session,
                sequence,
                handle,
                number,
                arg,
                flags,
                copies,
                payload,
            )
            reply = self._exchange(envelope.encode_request(request), lambda reply: reply.seq == sequence, name)
        if reply.errno:
            reason = reply.extra.decode(errors="replace") if not flags & envelope.FLAG_INLINE_PAGE else ""
            error = KvmError(reply.errno, name, reason)
            error.copies, error.extra = reply.copies, reply.extra  # type: ignore[attr-defined]
            raise error
        return reply

    def request_all(self, requests: list[tuple[int, int, int, tuple[Copy, ...], bytes]]) -> list[Reply]:
        """The replies, errors too, to many requests (handle, number, arg, copies, payload) that go in one message. KvmError
        when the server is gone, or refuses the message as such.
        """
        self._link.check_owner("BATCH")
        link = self._link
        with self._lock:
            wanted, frames = [], []
            for handle, number, arg, copies, payload in requests:
                wanted.append(next(self._sequence))
                request = Request(link.incarnation, link.session, wanted[-1], handle, number, arg, 0, copies, payload)
                frames.append(envelope.encode_request(request))
            sequence = next(self._sequence)
            whole = envelope.encode_batch(frames)
            batch = Request(link.incarnation, link.session, sequence, 0, control.BATCH, 0, 0, (), whole)
            found: dict[int, Reply] = {}

            def take(reply: Reply) -> bool:
                if reply.seq != sequence:  # its own reply: long, or of a vCPU that was busy
                    found[reply.seq] = reply
                elif reply.errno:
                    raise KvmError(reply.errno, "BATCH", reply.extra.decode(errors="replace"))
                else:
                    for frame in envelope.decode_batch(reply.extra, len(frames)):
                        part = envelope.decode_reply(frame)
                        found[part.seq] = part
                return all(number in found for number in wanted)

            self._exchange(envelope.encode_request(batch), take, "BATCH")
        return [found[number] for number in wanted]

    def _connected(self) -> zmq.Socket[bytes]:
        made = zmq_socket.dealer(shared_context(), self._endpoint, self._curve)
        self._poller.register(made, zmq.POLLIN)
        if self._link.local:
            self._poller.register(self._link.fileno(), zmq.POLLIN)
        return made

    def _exchange(self, frame: bytes, is_last: Callable[[Reply], bool], name: str) -> Reply:
        if self._link.closed:
            raise KvmError(ECONNRESET, name, "the session is closed")
        if not self._link.alive:
            raise KvmError(ECONNRESET, name, "kvmcore's process is gone")
        if self._socket is None:
            self._socket = self._connected()
        try:
            while not self._socket.poll(_LOOK_MS, zmq.POLLOUT):  # a socket without a peer takes nothing
                if not self._link.alive:
                    raise KvmError(ECONNRESET, name, "kvmcore's process is gone")
                if self._link.local:  # it stands still, or lets nobody in for now: knock again
                    self._poller.unregister(self._socket)
                    self._socket.close()
                    self._socket = self._connected()
            self._socket.send(frame)
            while True:
                if self._socket not in dict(self._poller.poll(_LOOK_MS)):
                    if not self._link.alive and not self._socket.poll(_LAST_WORD_MS):
                        raise KvmError(ECONNRESET, name, "kvmcore's process is gone")
                    continue
                reply = envelope.decode_reply(self._socket.recv())
                if is_last(reply):
                    return reply
        except zmq.ZMQError as error:
            raise KvmError(ECONNRESET, name, "kvmcore's process does not answer") from error

    def close(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


def other_version(path: str, pid: int) -> str:
    """What to tell the user of a kvmcore process that was not started from the same source as this one."""
    return (
        f"kvmcore at {path} (process {pid}) is of another version than this program; `softkvm upgrade` starts one of this "
        "version, VMs that run stay with theirs until they are upgraded, too"
    )


class Link:
    """The session's Unix socket with one server process; SCM_RIGHTS and sign of life."""

    local = True
    """Whether memory and descriptors can be shared with the server (remote.py's cannot)."""

    def __init__(self, path: str, body: dict[str, Any], name: str) -> None:
        """Connect and say hello. KvmError with the errno of connect(2) or of the refusal."""
        self._lock = threading.Lock()
        self._sequence = itertools.count(1)
        self._channels: list[Channel] = []
        self.closed = False
        self._owner = _process[0]
        self._vdso: Vdso | None = None
        self._asked_vdso = False
        self.session = b""
        self.incarnation = 0
        for left in reversed(range(_HELLOS)):
            self._connect(path, name)
            try:
                self.welcome = self._say(Op.HELLO, name, body=body)[0].body
                if self.welcome.get("version") != _VERSION:
                    raise KvmError(EPROTO, name, other_version(path, fd_passing.credentials(self._socket).pid))
                return
            except BaseException as error:
                self._socket.close()
                if not left or getattr(error, "errno", 0) != ECONNRESET:
                    raise

    def _connect(self, path: str, name: str) -> None:
        try:
            self._socket = fd_passing.connect(path)
        except OSError as error:
            hint = ""
            if error.errno in (ENOENT, ECONNREFUSED):
                hint = f"no kvmcore daemon listens on {path}; start one with: python -m kvmcore --listen ipc://{path}"
            raise KvmError(error.errno or EINVAL, name, hint or str(error)) from error

    def check_owner(self, name: str) -> None:
        """KvmError(EIO) in a forked child: a session belongs to the process that opened it (KVM_ABI 1.1 b)."""
        if _process[0] != self._owner:
            raise KvmError(EIO, name, "the session belongs to another process")

    def channel(self) -> Channel:
        """A new way to send requests."""
        made = Channel(self, str(self.welcome["router"]))
        self._channels.append(made)
        return made

    def drop(self, channel: Channel) -> None:
        """The channel is no longer needed: its connection goes. Idempotent."""
        channel.close()
        if channel in self._channels:
            self._channels.remove(channel)

    def vdso(self) -> Vdso | None:
        """kvmcore's code for clients, mapped once; None where it cannot be had."""
        if not self._asked_vdso:
            self._asked_vdso = True
            with suppress(KvmError, OSError):
                (fd,) = self.say(Op.VDSO, "vdso")
                try:
                    self._vdso = Vdso(fd)
                finally:
                    os.close(fd)
        return self._vdso

    def say(
        self,
        op: Op,
        name: str,
        a: int = 0,
        b: int = 0,
        c: int = 0,
        d: int = 0,
        fds: list[int] | None = None,
        body: dict[str, Any] | None = None,
    ) -> list[int]:
        """One message on the socket; the descriptors that came back, ours to close. KvmError."""
        return self._say(op, name, a, b, c, d, fds, body)[1]

    def _say(
        self,
        op: Op,
        name: str,
        a: int = 0,
        b: int = 0,
        c: int = 0,
        d: int = 0,
        fds: list[int] | None = None,
        body: dict[str, Any] | None = None,
    ) -> tuple[Message, list[int]]:
        self.check_owner(name)
        with self._lock:
            message = Message(op, next(self._sequence), 0, a, b, c, d, body or {})
            try:
                fd_passing.send(self._socket, session_codec.encode(message), fds)
                data, received = fd_passing.receive(self._socket, session_codec.MAX_MESSAGE)
            except OSError as error:
                raise KvmError(ECONNRESET, name, f"kvmcore's process is gone: {error}") from error
        if not data:
            raise KvmError(ECONNRESET, name, "kvmcore's process is gone")
        answer = session_codec.decode(data)
        if answer.errno:
            fd_passing.close_all(received)
            raise KvmError(answer.errno, name, str(answer.body.get("reason", "")))
        if answer.op != op:
            fd_passing.close_all(received)
            raise KvmError(EPROTO, name, "the session's socket is out of step")
        return answer, received

    def pass_files(self, fds: list[int]) -> None:
        """Make our descriptors known to the server under their own numbers, without waiting for it after each. KvmError."""
        self.check_owner("sendmsg")
        errnos = []
        with self._lock:
            for at in range(0, len(fds), _PASSED_AT_ONCE):
                some = fds[at : at + _PASSED_AT_ONCE]
                try:
                    for fd in some:
                        message = Message(Op.PASS_FILE, next(self._sequence), a=fd)
                        fd_passing.send(self._socket, session_codec.encode(message), [fd])
                    answers = [fd_passing.receive(self._socket, session_codec.MAX_MESSAGE)[0] for _ in some]
                except OSError as error:
                    raise KvmError(ECONNRESET, "sendmsg", f"kvmcore's process is gone: {error}") from error
                if not all(answers):
                    raise KvmError(ECONNRESET, "sendmsg", "kvmcore's process is gone")
                errnos += [session_codec.decode(answer).errno for answer in answers]
        if any(errnos):
            raise KvmError(next(filter(None, errnos)), "sendmsg", "a descriptor was not taken")

    @property
    def alive(self) -> bool:
        """Whether the server's process still holds its end."""
        if self.closed:
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        ready = poll.poll(0)
        if not ready:
            return True
        if ready[0][1] & (select.POLLHUP | select.POLLERR):
            return False
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def fileno(self) -> int:
        """The session's socket: readable (end of stream) when the server is gone."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the session. Idempotent."""
        if not self.closed:
            self.closed = True
            for channel in self._channels:
                channel.close()
            self._socket.close()
