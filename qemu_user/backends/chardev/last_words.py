"""The end of what a console has shown, kept so that a kernel's panic can be told from a reboot that somebody wanted.

Linux says why it panics (kernel/panic.c), then resets the machine as `panic=-1` asks it to; SBI's system reset gives no
reason (SBI, chapter 10). Fed by Chardev, asked by machine.py.
"""

from __future__ import annotations

import re

#: What is kept: the message, and the registers and call trace behind it.
_KEPT = 16 * 1024
_PANIC = re.compile(rb"^\[ *\d+\.\d+\](?:\[[^\]]*\])? Kernel panic - not syncing: ([^\r\n]*)", re.MULTILINE)


class LastWords:
    """Of one console. Any thread, the chardev's lock being held."""

    def __init__(self) -> None:
        self._end = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._end += data
        if len(self._end) > 2 * _KEPT:
            del self._end[:-_KEPT]

    def panic(self) -> str:
        """What the kernel said last if it panicked; "" if it did not. Forgets it: a machine that is reset begins anew."""
        found = _PANIC.findall(self._end)
        self._end.clear()
        return found[-1].decode(errors="replace").strip() or "for no reason" if found else ""
