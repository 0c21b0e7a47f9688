"""What all handles share: ioctls by name or number, and pointees at addresses that exist only in one request.

A struct travels as a copy at ARGUMENT, what it points at as a copy at POINTEE: the server sees both in the
session's address space while it serves the request, as copy_from_user would see the caller's memory.
"""

from __future__ import annotations

from errno import EFAULT, EINVAL
from typing import Any

from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_NAME, Ioctl, find
from protocol.client.link import Channel, Link
from protocol.codec import control
from protocol.codec.envelope import COPY_IN, COPY_OUT, Copy, Reply

ARGUMENT = 0x7F00_0000_0000
POINTEE = 0x7F00_1000_0000


class Handle:
    """An open handle of `kind`; `number` is what the server calls it."""

    kind = ""

    def __init__(self, link: Link, channel: Channel, number: int) -> None:
        self.link, self.channel, self.number = link, channel, number
        self.closed = False

    @property
    def handle(self) -> int:
        """The handle's number: what structs carry in place of a file descriptor."""
        return self.number

    def ioctl(
        self,
        request: str | int,
        argument: int | bytes | bytearray = 0,
        pointees: dict[int, bytes | bytearray] | None = None,
    ) -> int:
        """ioctl(2) as it is: an integer argument, or a struct's bytes. Returns the value; KvmError.

        `pointees`: address -> memory that pointers in the struct lead to; a bytearray is written back, as is
        `argument` if it is one.
        """
        row = BY_NAME.get(request) if isinstance(request, str) else find(self.kind, request)
        if row is None and isinstance(request, str):
            raise KvmError(EINVAL, request, "no ioctl of that name")
        number = row.number if row is not None else int(request)
        memory = dict(pointees or {})
        arg = argument if isinstance(argument, int) else ARGUMENT
        if not isinstance(argument, int):
            memory[ARGUMENT] = argument
        copies = tuple(
            Copy(
                address,
                len(data),
                COPY_IN | COPY_OUT if isinstance(data, bytearray) else COPY_IN,
                bytes(data),
            )
            for address, data in memory.items()
        )
        label = row.name if row is not None else f"{number:#x}"
        try:
            reply = self.channel.request(self.number, number, arg, name=label, copies=copies)
        except KvmError as error:
            self._write_back(getattr(error, "copies", ()), memory)
            raise
        self._write_back(reply.copies, memory)
        return reply.ret

    @staticmethod
    def _write_back(copies: tuple[tuple[int, bytes], ...], memory: dict[int, bytes | bytearray]) -> None:
        for address, data in copies:
            target = memory.get(address)
            if isinstance(target, bytearray) and len(target) == len(data):
                target[:] = data

    def call(self, name: str, **members: Any) -> int:
        """An ioctl whose struct is built from its members."""
        return self.ioctl(name, self._layout(name).build(**members))

    def call_out(self, name: str, **members: Any) -> Any:
        """The same for structs that come back; returns the parsed struct."""
        layout = self._layout(name)
        data = bytearray(layout.build(**members))
        self.ioctl(name, data)
        return layout.parse(bytes(data))

    @staticmethod
    def _layout(name: str) -> Any:
        row: Ioctl = BY_NAME[name]
        if row.argument is None:
            raise KvmError(EFAULT, name, "takes no struct")
        return row.argument

    def control(self, request: int, arg: int = 0, payload: bytes = b"") -> Reply:
        """A request that is not an ioctl."""
        name = control.NAMES.get(request, hex(request))
        return self.channel.request(self.number, request, arg, name=name, payload=payload)

    def close(self) -> None:
        """close(2). Idempotent; a server that is gone has closed it already."""
        if not self.closed:
            self.closed = True
            try:
                self.control(control.CLOSE)
            except KvmError:
                pass
