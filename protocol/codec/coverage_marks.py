"""Where a fuzzed server marks, in a file that the fuzzer maps, the ways from line to line that its source has taken.

A byte for each hash of (file, line before, line), so that new ways through old lines count too. Used by
kvmcore/server/coverage.py, which marks, and by qemu_user/fuzz, which counts and says which branches are missing. Pure.
"""

from __future__ import annotations

SIZE = 1 << 20
FOLDERS = ("protocol/abi", "protocol/codec", "kvmcore/ioctl", "kvmcore/server", "kvmcore/vm")
"""Whose lines are watched, below the root of the source."""


def seed(name: str) -> int:
    """Of a file, "/kvmcore/vm/vm.py": FNV-1a, the same in every process."""
    value = 0x811C9DC5
    for byte in name.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value


def place(file: int, before: int, line: int, size: int) -> int:
    """Index of the mark; `file`: its seed; `before`: the line before in the same call, 0 at its beginning."""
    return (file + line * 31 + before * 7919) % size
