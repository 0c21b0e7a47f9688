"""QMP's wire format: a stream of JSON objects, not lines (QEMU's docs/interop/qmp-spec.rst).

Used by both ends, qemu_user/management/qmp_server.py and qmp_client.py. Pure: bytes in, objects and errors
out. Clients may send objects without any line end, several at once, or one in pieces; nesting and length are
bounded.
"""

from __future__ import annotations

import json
from typing import Any

MAX_MESSAGE = 1 << 20
MAX_DEPTH = 64
_SPACE = b" \t\r\n"


class QmpSyntaxError(ValueError):
    """What came is not JSON, or not an object. The reader has skipped it and goes on."""


class QmpReader:
    """Cuts a byte stream into JSON objects."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, data: bytes) -> list[dict[str, Any] | QmpSyntaxError]:
        """What is complete now, in order; errors take the place of what could not be read."""
        self._buffer += data
        found: list[dict[str, Any] | QmpSyntaxError] = []
        while (item := self._next()) is not None:
            found.append(item)
        return found

    def _next(self) -> dict[str, Any] | QmpSyntaxError | None:
        buffer = self._buffer
        if not self._at:
            skipped = len(buffer) - len(buffer.lstrip(_SPACE))
            del buffer[:skipped]
            if not buffer:
                return None
            if buffer[0] not in b"{[":
                return self._reject("expected a JSON object")
        while self._at < len(buffer):
            value = buffer[self._at]
            self._at += 1
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif value == 0x5C:
                    self._escaped = True
                elif value == 0x22:
                    self._in_string = False
            elif value == 0x22:
                self._in_string = True
            elif value in b"{[":
                self._depth += 1
                if self._depth > MAX_DEPTH:
                    return self._reject("nested too deeply")
            elif value in b"}]":
                self._depth -= 1
                if not self._depth:
                    return self._complete()
        if len(buffer) > MAX_MESSAGE:
            return self._reject("message too long")
        return None

    def _complete(self) -> dict[str, Any] | QmpSyntaxError:
        text = bytes(self._buffer[: self._at])
        del self._buffer[: self._at]
        self._at = 0
        try:
            message = json.loads(text)
        except (ValueError, RecursionError) as error:
            return QmpSyntaxError(f"JSON parse error, {error}")
        if not isinstance(message, dict):
            return QmpSyntaxError("QMP input must be a JSON object")
        return message

    def _reject(self, why: str) -> QmpSyntaxError:
        """Skip to the end of the line: the best place to fall into step again."""
        end = self._buffer.find(b"\n", max(self._at - 1, 0))
        del self._buffer[: end + 1 if end >= 0 else len(self._buffer)]
        self._at = self._depth = 0
        self._in_string = self._escaped = False
        return QmpSyntaxError(f"JSON parse error, {why}")


def encode(message: dict[str, Any]) -> bytes:
    """An object as it goes out: compact, CR LF behind it as QEMU has."""
    return json.dumps(message).encode() + b"\r\n"
