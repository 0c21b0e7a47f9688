"""The way out of a raw terminal, as QEMU's -nographic has it: Ctrl-A, then a key.

A filter on the terminal's input. Where the VM lives in this process (`run`) x ends it; on a console (`console`) d leaves it,
the VM goes on. h or ? explains, Ctrl-A again sends one Ctrl-A. Pure: bytes in, bytes for the guest and commands out.
"""

from __future__ import annotations

PREFIX = 0x01
#: Key -> (command, what it does).
OWN_VM = {"x": ("quit", "end the VM")}
CONSOLE = {"d": ("detach", "leave the console, the VM goes on")}


class EscapeFilter:
    """Keeps whether the last byte was the prefix. `keys`: OWN_VM or CONSOLE."""

    def __init__(self, keys: dict[str, tuple[str, str]] = OWN_VM) -> None:
        self._keys = keys
        self._armed = False

    @property
    def help(self) -> str:
        """What Ctrl-A h shows."""
        lines = [f"Ctrl-A {key}  {what}" for key, (_, what) in self._keys.items()]
        lines += ["Ctrl-A h  this help", "Ctrl-A Ctrl-A  send Ctrl-A to the guest"]
        return "\r\n" + "".join(f"{line}\r\n" for line in lines)

    def feed(self, data: bytes) -> tuple[bytes, str]:
        """(bytes for the guest, command): command is "", "help" or one of `keys`; what follows the latter is dropped."""
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
            key = chr(value).lower()
            if key in self._keys:
                return bytes(kept), self._keys[key][0]
            if value in b"hH?":
                command = "help"
            else:
                kept.append(value)  # Ctrl-A itself, or a key that means nothing after it
        return bytes(kept), command
