"""The switch's control socket: one JSON request to a line, one JSON answer to a line, for `softkvm switch`.

    {"execute": "show"}  ->  {"return": {...}}  or  {"error": "a sentence"}
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from typing import Any

from qemu_user.backends.io_loop import IoLoop
from qemu_user.switch.sockets import Listener

_LONGEST = 64 << 10
_CLIENTS = 32


class ControlError(Exception):
    """Refused; the text is for the user."""


class Control:
    """`commands`: name -> what it does with its arguments; ControlError, or what to answer."""

    def __init__(self, path: str, loop: IoLoop, commands: Mapping[str, Callable[[dict[str, Any]], Any]]) -> None:
        self._loop, self._commands = loop, commands
        self._clients: dict[int, socket.socket] = {}
        self._listener = Listener(path, loop, self._accept)

    def _accept(self, sock: socket.socket) -> None:
        if len(self._clients) >= _CLIENTS:
            sock.close()
            return
        sock.setblocking(False)
        data = bytearray()
        self._clients[sock.fileno()] = sock
        self._loop.add_reader(sock.fileno(), lambda: self._readable(sock, data))

    def _readable(self, sock: socket.socket, data: bytearray) -> None:
        try:
            part = sock.recv(_LONGEST)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            part = b""
        data += part
        if not part or (len(data) > _LONGEST and b"\n" not in data):
            self._leave(sock)
            return
        while (end := data.find(b"\n")) >= 0:
            line = bytes(data[:end])
            del data[: end + 1]
            answer = json.dumps(self._answer(line)).encode() + b"\n"
            try:
                sent = sock.send(answer, socket.MSG_NOSIGNAL)
            except OSError:
                sent = 0
            if sent < len(answer):  # it does not read what it asks for
                self._leave(sock)
                return

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            command = self._commands[request["execute"]]
            arguments = dict(request.get("arguments") or {})
        except (ValueError, KeyError, TypeError, AttributeError):
            return {"error": f"no such request; there are {', '.join(self._commands)}"}
        try:
            return {"return": command(arguments)}
        except ControlError as error:
            return {"error": str(error)}

    def _leave(self, sock: socket.socket) -> None:
        if self._clients.pop(sock.fileno(), None) is not None:
            self._loop.remove(sock.fileno())
            sock.close()

    def close(self) -> None:
        self._listener.close()
        for sock in tuple(self._clients.values()):
            self._leave(sock)


def ask(path: str, execute: str, **arguments: Any) -> Any:
    """A request to a running switch, and its answer. ControlError, OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(path)
        sock.sendall(json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n")
        with sock.makefile("rb") as lines:
            line = lines.readline()
    if not line:
        raise ControlError("the switch has hung up")
    answer = json.loads(line)
    if "error" in answer:
        raise ControlError(str(answer["error"]))
    return answer["return"]
