"""SBI's debug console as a front end of the console hub: written by exits/sbi.py, read by polling."""

from __future__ import annotations

import threading

from qemu_user.backends.chardev.chardev import Chardev

_INPUT = 256


class DebugConsole:
    """Keeps a little input until the guest asks for it."""

    def __init__(self, chardev: Chardev) -> None:
        self._chardev = chardev
        self._input = b""
        self._lock = threading.Lock()
        chardev.connect(self)

    def write(self, data: bytes | memoryview) -> int:
        """How many bytes were taken."""
        return self._chardev.write(data)

    def read(self, count: int) -> bytes:
        """What came, at most `count` bytes."""
        with self._lock:
            data, self._input = self._input[:count], self._input[count:]
        if data:
            self._chardev.resume_input()
        return data

    def input_room(self) -> int:
        return _INPUT - len(self._input)

    def receive(self, data: bytes) -> None:
        with self._lock:
            self._input += data

    def output_ready(self) -> None:
        pass

    def opened(self) -> None:
        pass

    def closed(self) -> None:
        pass

    def resized(self, rows: int, columns: int) -> None:
        pass
