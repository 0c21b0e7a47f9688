"""A small QMP client: what `softkvm stop`, `kill` and the tests talk to a running VM with. Blocking, one
command at a time.
"""

from __future__ import annotations

import socket
from typing import Any

from protocol.codec.qmp import QmpReader, QmpSyntaxError, encode


class QmpError(Exception):
    """The VM refused a command; `kind` is the error class."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class QmpClient:
    """Connects and negotiates. OSError (ConnectionError when the VM goes away), QmpError."""

    def __init__(self, path: str, timeout: float = 10.0) -> None:
        self._reader = QmpReader()
        self._waiting: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        """Events that came while a command waited for its answer."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(path)
            self.greeting = self._receive()
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def execute(self, command: str, **arguments: Any) -> Any:
        """The command's result; '_' in argument names becomes '-'."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._socket.sendall(encode({"execute": command, **({"arguments": named} if named else {})}))
        while True:
            message = self._receive()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QmpError(message["error"].get("class", ""), message["error"].get("desc", ""))
            elif "return" in message:
                return message["return"]

    def next_event(self) -> dict[str, Any]:
        """The next event, waiting for it."""
        if self.events:
            return self.events.pop(0)
        while "event" not in (message := self._receive()):
            pass
        return message

    def _receive(self) -> dict[str, Any]:
        while not self._waiting:
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionResetError("the VM closed the connection")
            for message in self._reader.feed(data):
                if isinstance(message, QmpSyntaxError):
                    raise ConnectionResetError("the peer does not speak QMP")
                self._waiting.append(message)
        return self._waiting.pop(0)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> QmpClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
