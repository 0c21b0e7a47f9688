"""What is asked of the warm parent, in bytes: which program with which arguments, environment, umask and descriptors. No I/O,
and nothing imported but what a command can afford that wants to be quick.

Layout, little endian: u32 length of what follows, u32 umask, u32 flags, u32 numbers of arguments, of variables, of descriptors;
for each descriptor (u32) the number that it shall have; then, each followed by a zero byte, program, arguments, variables as
NAME=VALUE. Before those descriptors come the working directory, and with DIES the read end of a pipe.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

SOFTKVM, ARRIVAL = "softkvm", "arrival"
"""Programs: `softkvm ...`; the process of a VM that comes from elsewhere (migration/arrival.py)."""
DIES = 1
"""Flag: it dies as by SIGKILL when nobody has the write end of the pipe any more."""
MOST_FDS = 200
"""Descriptors in a request; the kernel's limit is 253."""
MAX_REQUEST = 4 << 20
TITLE_ROOM = 512
"""Length of an argument of the parent's that says nothing, so that its children have room for their command lines."""
LENGTH = struct.Struct("<I")
_HEAD = struct.Struct("<5I")


class Request(NamedTuple):
    """One process to be. Strings are bytes as the kernel has them."""

    program: bytes
    arguments: list[bytes]
    environment: dict[bytes, bytes]
    umask: int
    dies: bool
    numbers: list[int]
    """Of the descriptors that come along."""

    def encode(self) -> bytes:
        """With its length in front."""
        words = [self.program, *self.arguments, *(b"=".join(pair) for pair in self.environment.items())]
        flags = DIES if self.dies else 0
        head = _HEAD.pack(self.umask, flags, len(self.arguments), len(self.environment), len(self.numbers))
        body = head + struct.pack(f"<{len(self.numbers)}I", *self.numbers) + b"".join(word + b"\0" for word in words)
        return LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Request:
    """Of what follows the length. ValueError."""
    try:
        umask, flags, arguments, variables, descriptors = _HEAD.unpack_from(body)
        if descriptors > MOST_FDS:
            raise ValueError("too many descriptors")
        numbers = list(struct.unpack_from(f"<{descriptors}I", body, _HEAD.size))
        words = body[_HEAD.size + 4 * descriptors :].split(b"\0")
    except struct.error as error:
        raise ValueError("cut off") from error
    if len(words) != 2 + arguments + variables or words.pop() or any(b"=" not in word[1:] for word in words[1 + arguments :]):
        raise ValueError("not what was announced")
    pairs = (word.partition(b"=") for word in words[1 + arguments :])
    environment = {name: value for name, _, value in pairs}
    return Request(words[0], words[1 : 1 + arguments], environment, umask & 0o777, bool(flags & DIES), numbers)
