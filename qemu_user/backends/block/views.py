"""Scattered buffers: cutting a list of views into consecutive pieces without copying."""

from __future__ import annotations

_ZEROES = bytes(1 << 20)


class Cutter:
    """Takes pieces off the front of a list of views."""

    def __init__(self, views: list[memoryview]) -> None:
        self._views = views
        self._index = self._at = 0

    def next(self, length: int) -> list[memoryview]:
        """The next `length` bytes, as views. No more than there are."""
        taken: list[memoryview] = []
        while length:
            view = self._views[self._index]
            part = view[self._at : self._at + length]
            length -= len(part)
            self._at += len(part)
            if self._at == len(view):
                self._index, self._at = self._index + 1, 0
            if part:
                taken.append(part)
        return taken


def fill_zero(views: list[memoryview]) -> None:
    """Make them all zeroes."""
    for view in views:
        for at in range(0, len(view), len(_ZEROES)):
            part = view[at : at + len(_ZEROES)]
            part[:] = _ZEROES[: len(part)]


def is_zero(views: list[memoryview]) -> bool:
    """Whether they hold nothing but zeroes."""
    return not any(bytes(view[:16]).strip(b"\0") for view in views) and not any(bytes(view).strip(b"\0") for view in views)
