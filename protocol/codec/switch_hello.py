"""What a VM and the virtual switch say to each other before frames flow on a port's socket. Pure.

    message   magic "SKSW", u32 length (big-endian), JSON
    Hello     from who is plugged in: the port's name and what it is to be (qemu_user/switch/settings.py has the words)
    Welcome   from the switch: the name that the port got, or why it refuses

From then on both send framed frames (ethernet_stream.py) with virtio-net headers (virtio 1.2, 5.1.6, 12 bytes).
"""

from __future__ import annotations

import struct
from typing import TypeVar

import msgspec

MAGIC = b"SKSW"
_HEAD = struct.Struct(">4sI")
MAX_HELLO = 4096


class HelloError(ValueError):
    """The peer does not speak this."""


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """`name`: of the port, VM/NETDEV; `settings`: "" for what the switch gives."""

    version: int = 1
    name: str
    settings: str = ""


class Welcome(msgspec.Struct, frozen=True, kw_only=True):
    """`error`: "" when the port is there."""

    version: int = 1
    port: str = ""
    error: str = ""


Message = TypeVar("Message", Hello, Welcome)


def pack(message: Hello | Welcome) -> bytes:
    """A message as it goes over the socket."""
    data = msgspec.json.encode(message)
    return _HEAD.pack(MAGIC, len(data)) + data


def unpack(data: bytes, kind: type[Message]) -> Message | None:
    """The message that `data` is; None while bytes are missing. HelloError."""
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise HelloError("the other end does not speak the switch's protocol")
    if len(data) < _HEAD.size:
        return None
    _, length = _HEAD.unpack_from(data)
    if length > MAX_HELLO:
        raise HelloError(f"a greeting of {length} bytes")
    if len(data) < _HEAD.size + length:
        return None
    try:
        message = msgspec.json.decode(data[_HEAD.size : _HEAD.size + length], type=kind)
    except msgspec.MsgspecError as error:
        raise HelloError(f"a greeting that makes no sense: {error}") from error
    if message.version != 1:
        raise HelloError(f"the other end speaks version {message.version}, this one 1")
    return message


def size(data: bytes) -> int:
    """Bytes of the message that `data` begins with; unpack() has accepted it."""
    return _HEAD.size + int(_HEAD.unpack_from(data)[1])
