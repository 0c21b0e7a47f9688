"""Pages that the destination has in an older version, sent as what has changed: the exclusive or of both, which is mostly
zeroes and compresses well. For links that are slower than this is (source.py); what the destination has is kept in mind here.

XBZRLE's idea (QEMU), with zstd for the run lengths.
"""

from __future__ import annotations

from collections import OrderedDict

PAGE = 4096
MOST_BYTES = 64 << 20


def xor(one: bytes | memoryview, other: bytes | memoryview) -> bytes:
    """Of two buffers of one length."""
    length = len(one)
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(length, "little")


class Sent:
    """The pages of RAM that the destination has, those that were sent last, up to `most` bytes."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._pages: OrderedDict[int, bytes] = OrderedDict()
        self._most = most // PAGE

    def before(self, first: int, count: int) -> bytes | None:
        """What the destination has of the pages [first, first + count); None unless all are known."""
        pages = [self._pages.get(page) for page in range(first, first + count)]
        return b"".join(page for page in pages if page is not None) if all(pages) else None

    def now(self, first: int, content: bytes) -> None:
        """They have been sent."""
        for at in range(0, len(content), PAGE):
            page = first + at // PAGE
            self._pages[page] = content[at : at + PAGE]
            self._pages.move_to_end(page)
        while len(self._pages) > self._most:
            self._pages.popitem(last=False)

    def forget(self, first: int, count: int) -> None:
        """They were made zero there."""
        for page in range(first, first + count):
            self._pages.pop(page, None)
