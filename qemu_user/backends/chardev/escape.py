"""The way out of a raw terminal, as QEMU's -nographic has it: Ctrl-A, then a key.

A filter on the terminal's input: x ends the VM, h or ? explains, Ctrl-A again sends one Ctrl-A. Pure: bytes
in, bytes for the guest and commands out.
"""

from __future__ import annotations

PREFIX = 0x01
HELP = "\r\nCtrl-A x  end the VM\r\nCtrl-A h  this help\r\nCtrl-A Ctrl-A  send Ctrl-A to the guest\r\n"


class EscapeFilter:
    """Keeps whether the last byte was the prefix."""

    def __init__(self) -> None:
        self._armed = False

    def feed(self, data: bytes) -> tuple[bytes, str]:
        """(bytes for the guest, command): command is "", "quit" or "help"; what follows a quit is dropped."""
        if not self._armed and PREFIX not in data:
            return data, ""
        kept = bytearray()
        command = ""
        for value in data:
            if not self._armed:
                if value == PREFIX:
                    self._armed = True
                else:
                    kept.append(value)
                continue
            self._armed = False
            if value in b"xX":
                return bytes(kept), "quit"
            if value in b"hH?":
                command = "help"
            else:
                kept.append(value)  # Ctrl-A itself, or a key that means nothing after it
        return bytes(kept), command
