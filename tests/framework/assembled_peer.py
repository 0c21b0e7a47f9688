"""Template code without a translator process: pages are assembled here, and installed before the code runs again.

As translated_peer.py, whose regions may be there too: each case is run by the interpreter first. Used by differential tests.
"""

from __future__ import annotations

import random
from functools import cache

from kvmcore.engine.cold_code import executed
from kvmcore.engine.loader import Image
from kvmcore.engine.machine import Machine
from kvmcore.engine.template_code import Assembler, TemplateMemory
from kvmcore.engine.translation import identity_of
from tests.framework.engine_peer import native_image
from tests.framework.translated_peer import Regions, TranslatedPeer

_SECRET = bytes(32)
ALL = (1 << 2048) - 1


@cache
def _assembler(image: Image) -> Assembler:
    return Assembler(image)


class Templates:
    """Assembles and installs the decoded pages of one machine."""

    def __init__(self, machine: Machine, image: Image) -> None:
        self._machine, self._image = machine, image
        self._number = self.installed = 0
        self._begin()
        machine.state.templates, machine.state.regions = image.templates, image.arena

    def _begin(self) -> None:
        self._number += 1
        self._memory = TemplateMemory(self._number, _assembler(self._image))
        self._image.map_templates(self._memory.memory.fd)

    def install(self, base: int, among: int = ALL) -> bool:
        """What has been executed of a decoded page, as far as its bit is in `among`."""
        content = Regions.content(base)
        key = identity_of(_SECRET, content + among.to_bytes(256, "little"))
        page = self._memory.place(key, content, executed(base) & among)
        if page is None:  # full: nobody is in it, but records lead there
            self._machine.forget_decoded()
            self._begin()
            return False
        self._image.install_templates(base, page.place)
        self.installed += 1
        return True


class AssembledPeer(TranslatedPeer):
    """Every case runs in template code, as far as its instructions have templates: all of it, or as much as chance has it."""

    def __init__(self, limit: float = 1.0, rounds: int = 1, regions: bool = False) -> None:
        """`regions`: also in regions."""
        super().__init__(limit, heads=1, rounds=rounds)
        self._both = regions
        self.templates = Templates(self._machine, native_image())

    def _translate(self, base: int, offsets: list[int], choice: random.Random, first: int) -> None:
        some = choice.getrandbits(2048) | choice.getrandbits(2048)
        if self.templates.install(base, choice.choice((ALL, some))) and self._both:
            super()._translate(base, offsets, choice, -1)
