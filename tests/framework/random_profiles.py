"""Which items a random program is made of: named mixtures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.framework import random_items as items
from tests.framework import random_system as system
from tests.framework.random_items import Item, Maker
from tests.framework.random_paging import SV39, SV48

if TYPE_CHECKING:
    from tests.framework.random_programs import Surroundings


@dataclass(frozen=True)
class Profile:
    """Items with their weights; `paged`: the satp modes to choose from, None for any."""

    makers: tuple[tuple[Maker, int], ...]
    paged: tuple[int, ...] | None = None
    qemu: bool = True
    """Whether QEMU 7.2 has everything in it."""

    @property
    def patches(self) -> bool:
        """Whether it writes code."""
        return any(maker is items.patch for maker, _ in self.makers)


PROFILES: dict[str, Profile] = {
    "integer": Profile(((items.compute, 6), (items.multiply, 4), (items.branch, 4), (items.memory, 1))),
    "float": Profile(((items.fp, 10), (items.memory, 1), (items.compute, 1))),
    "memory": Profile(((items.memory, 8), (items.atomic, 4), (items.compute, 2), (items.branch, 1))),
    "paging": Profile(
        ((items.memory, 6), (items.atomic, 2), (system.paging, 6), (system.drop, 2), (items.fetch, 1)),
        (SV39, SV39, SV48),
    ),
    "traps": Profile(
        ((items.trap, 5), (items.fetch, 1), (system.csr, 5), (system.interrupt, 3), (system.drop, 2))
        + ((system.sret, 1), (items.fence, 1), (items.compute, 2), (items.branch, 1))
    ),
    "raw": Profile(((items.raw, 10), (items.compute, 2)), (SV39, SV48)),
    "patch": Profile(((items.patch, 5), (items.branch, 3), (items.compute, 3), (items.fence, 1))),
    "cache": Profile(((items.block, 4), (items.memory, 1), (system.drop, 1), (system.csr, 1)), qemu=False),
    "mixed": Profile(
        ((items.compute, 4), (items.multiply, 2), (items.fp, 4), (items.memory, 4), (items.atomic, 2))
        + ((items.branch, 4), (items.trap, 1), (items.fetch, 1), (items.fence, 1), (items.patch, 1))
        + ((system.csr, 2), (system.interrupt, 1), (system.paging, 2), (system.drop, 1), (system.sret, 1))
    ),
}


def item(here: Surroundings, profile: Profile) -> Item:
    """One item of a profile."""
    makers, weights = zip(*profile.makers, strict=True)
    maker = here.rng.choices(makers, weights)[0]
    return Item(maker(here), maker.__name__)
