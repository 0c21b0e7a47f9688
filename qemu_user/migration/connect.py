"""Calling a host that takes VMs in: a Channel to the process that it makes for ours."""

from __future__ import annotations

import socket
from functools import partial

import zmq

from protocol.channel import zmq_socket
from protocol.channel.zmq_socket import Curve
from qemu_user.migration import messages
from qemu_user.migration.channel import Channel, ChannelError, Frame, StreamChannel, ZmqChannel
from qemu_user.migration.host import HostError, decode_reply
from qemu_user.migration.job import JobError

_CALL_MS = 15_000


def connect(uri: str, key: Curve | None = None) -> Channel:
    """`uri`: ipc://PATH, or tcp://HOST:PORT with our `key` that names the host's public one. JobError."""
    scheme, _, address = uri.partition("://")
    if scheme == "ipc":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(address)
        except OSError as error:
            sock.close()
            raise JobError(f"no host listens on {uri} ({error.strerror}); start one with: softkvm host serve") from error
        return StreamChannel(sock)
    if scheme == "tcp" and key is not None:
        return _over_tcp(uri, address.rpartition(":")[0], key)
    raise JobError(f"{uri}: expected ipc://PATH, or tcp://HOST:PORT and keys")


def expect(channel: Channel, kind: int, seconds: float, other: int = 0) -> Frame:
    """The frame that is due, of `kind` or `other`. JobError with the destination's reason for a REJECT; ChannelError for
    anything else.
    """
    frame = channel.receive(seconds)
    if frame is None:
        raise ChannelError(f"the destination has not answered for {seconds:g} s")
    if frame.kind == messages.REJECT:
        raise JobError(f"the destination refuses it: {channel.read().decode(errors='replace')[:2000]}")
    if frame.kind not in (kind, other):
        raise ChannelError(f"message {frame.kind} where {kind} was due")
    return frame


def refusal(channel: Channel) -> str:
    """What the destination said before it hung up, while we were sending; "" if nothing."""
    channel.look = lambda: None
    try:
        while (frame := channel.receive(0)) is not None:
            said = channel.read()
            if frame.kind == messages.REJECT:
                return said.decode(errors="replace")[:2000]
    except ChannelError:
        pass
    return ""


def dial(uri: str, key: Curve) -> ZmqChannel:
    """A channel to the process that takes our VM, at tcp://HOST:PORT."""
    channel = ZmqChannel(zmq_socket.dealer(zmq_socket.context(), uri, key), is_router=False)
    channel.redial = partial(dial, uri, key)
    channel.called = (uri, key.public.decode(), key.server.decode())
    address = uri.rpartition(":")[0]
    channel.beside = lambda port: dial(f"{address}:{port}", key)
    return channel


def _over_tcp(uri: str, address: str, key: Curve) -> Channel:
    context = zmq_socket.context()
    try:
        with zmq_socket.dealer(context, uri, key) as caller:
            caller.send(b"{}")
            if not caller.poll(_CALL_MS):
                raise JobError(f"{uri} does not answer: no host there, or it does not know our key")
            reply = decode_reply(caller.recv())
        return dial(f"tcp://{address}:{int(reply['port'])}", key)
    except zmq.Again as error:
        raise JobError(f"{uri} cannot be reached: no host there, or it does not know our key") from error
    except (HostError, zmq.ZMQError, KeyError, ValueError) as error:
        raise JobError(f"{uri}: {error}") from error
