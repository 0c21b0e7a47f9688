"""What a process does with memory that others share: in interpreters of their own, for it changes the whole process."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[4]
pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or sys.implementation.name != "cpython", reason="another allocator"
)

_HOLES = """
import ctypes, sys
from protocol.channel import process_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
kept = {size: [bytes(size - 33) for _ in range(4000)] for size in (48, 112, 256, 512)}
large = [libc.malloc(2000) for _ in range(400)]
holes = {id(block) for blocks in kept.values() for block in blocks[::2]}
for size, blocks in kept.items():
    del blocks[::2]
for block in large[::2]:
    libc.free(block)
if sys.argv[1] == "settled":
    process_memory.settle()
new = {size: [bytes(size - 33) for _ in range(1000)] for size in kept}
filled = sum(id(block) in holes for blocks in new.values() for block in blocks)
again = {libc.malloc(2000) for _ in range(100)}
print(filled, len(again & set(large[::2])))
"""

_LOOKUPS = """
import sys
from protocol.channel import process_memory
name = "".join(["so", "me", " name"])
name = sys.intern(name)
before = sys.getrefcount(name)
hasattr(sys, name)
looked_up = sys.getrefcount(name)
process_memory.forget_lookups()
print(before, looked_up, sys.getrefcount(name))
"""


def _said(code: str, *words: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=_ROOT, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_what_comes_later_goes_into_no_holes() -> None:
    pieces, blocks = _said(_HOLES, "as it is")
    assert pieces > 1000, "there were no holes"
    assert blocks > 50
    pieces, blocks = _said(_HOLES, "settled")
    assert pieces < 100
    assert blocks < 10


def test_names_that_were_looked_up_are_not_held() -> None:
    before, looked_up, after = _said(_LOOKUPS)
    assert before < looked_up
    assert after == before
