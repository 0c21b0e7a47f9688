"""Template code in the translator: made on request, a page at a time, kept in a memory that VM processes map.

A VM asks when code of a page was seen in the interpreter, and says which instructions of it have been executed; only those are
worth the memory. When more of the page is asked for it is made anew, with what it had. Called by translator.py.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from kvmcore.engine.code_memory import CodeMemory
from kvmcore.engine.loader import TEMPLATE_BYTES, Image
from kvmcore.engine.template_assembler import HALVES, MOST, Work
from kvmcore.engine.translation import ENTRY, TEMPLATES

_ALIGN = 64


class Assembler:
    """template_assembler.py's native code, for one page after the other."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._out = ctypes.create_string_buffer(MOST)
        self._work = Work(table=image.table, out=ctypes.addressof(self._out))

    def code(self, content: bytes, wanted: int, place: int) -> tuple[bytes, int]:
        """The code of a page's instructions whose bit is set in `wanted` (bit i: halfword i), to be put at `place` of the
        memory for template code; and where in it the list of its heads is.
        """
        work = self._work
        for name in ("places", "groups", "leaders"):
            field = getattr(Work, name)
            ctypes.memset(ctypes.addressof(work) + field.offset, 0, field.size)
        ctypes.memmove(work.wanted, _bytes_of(wanted), HALVES)
        ctypes.memmove(work.content, content, len(content))
        work.base = self._image.templates + place
        self._image.assemble(ctypes.addressof(work))
        return ctypes.string_at(self._out, work.used), int(work.list)


def _bytes_of(bits: int) -> bytes:
    """A byte for each bit."""
    return f"{bits:0{HALVES}b}".encode().translate(_DIGITS)[: -HALVES - 1 : -1]


_DIGITS = bytes(byte & 1 for byte in range(256))


@dataclass(slots=True)
class Page:
    """wanted: what is in the code; place: of its list of heads."""

    wanted: int
    place: int


class TemplateMemory:
    """Template code of all VMs. When it is full a new one begins (translator.py)."""

    def __init__(self, number: int, assembler: Assembler) -> None:
        self.number = number
        self.memory = CodeMemory(f"softkvm-templates-{number}", TEMPLATE_BYTES)
        self._assembler = assembler
        self.used = 0
        self.pages: dict[bytes, Page] = {}

    def index(self) -> bytes:
        """What is in it, as ENTRY after ENTRY."""
        return b"".join(ENTRY.pack(identity, TEMPLATES, page.place) for identity, page in self.pages.items())

    def place(self, identity: bytes, content: bytes, wanted: int) -> Page | None:
        """What there is of a page, with at least what is wanted; None: it is full."""
        page = self.pages.get(identity)
        if page is not None:
            if wanted & ~page.wanted == 0:
                return page
            wanted |= page.wanted
        code, heads = self._assembler.code(content, wanted, self.used)
        if self.used + len(code) > TEMPLATE_BYTES:
            return None
        self.memory.write(self.used, code)
        page = self.pages[identity] = Page(wanted, self.used + heads)
        self.used = -(-(self.used + len(code)) // _ALIGN) * _ALIGN
        return page
