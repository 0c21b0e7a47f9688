"""Page tables for the random programs, built into a case's window: Sv39 or Sv48, with whatever bits are
asked for."""

from __future__ import annotations

import random

V, R, W, X, U, G, A, D = (1 << bit for bit in range(8))
SV39, SV48 = 8, 9
LEVELS = {SV39: 3, SV48: 4}


class Tables:
    """Tables in `image` (bytes of guest memory from `base` on); table pages are taken from `pool`
    (addresses)."""

    def __init__(self, image: bytearray, base: int, pool: list[int], mode: int) -> None:
        self._image, self._base, self._pool = image, base, pool
        self.mode = mode
        self.root = pool.pop(0)

    def satp(self, asid: int = 0) -> int:
        """The value for satp."""
        return self.mode << 60 | asid << 44 | self.root >> 12

    def _read(self, address: int) -> int:
        at = address - self._base
        return int.from_bytes(self._image[at : at + 8], "little")

    def write(self, address: int, pte: int) -> None:
        """Stores an entry."""
        at = address - self._base
        self._image[at : at + 8] = pte.to_bytes(8, "little")

    def slot(self, va: int, level: int = 0) -> int:
        """The address of the entry for va at a level (0 = 4 KiB); makes the tables above it."""
        table = self.root
        for step in range(LEVELS[self.mode] - 1, level, -1):
            entry = table + 8 * (va >> 12 + 9 * step & 511)
            pte = self._read(entry)
            if pte & V == 0:
                pte = self._pool.pop(0) >> 12 << 10 | V
                self.write(entry, pte)
            table = pte >> 10 << 12
        return table + 8 * (va >> 12 + 9 * level & 511)

    def map(self, va: int, pa: int, bits: int, level: int = 0) -> int:
        """Maps one page; the address of its entry."""
        entry = self.slot(va, level)
        self.write(entry, pa >> 12 << 10 | bits)
        return entry


def random_bits(rng: random.Random) -> int:
    """Bits 7:0 of a leaf entry: mostly usable in some way, sometimes invalid or reserved."""
    bits = rng.choice((R, R | W, R | W, R | W, R | X, R | W | X, X, W, W | X, 0))
    bits |= V if rng.random() < 0.93 else 0
    for bit, likely in ((U, 0.5), (G, 0.2), (A, 0.6), (D, 0.6)):
        bits |= bit if rng.random() < likely else 0
    return bits


def random_base(rng: random.Random, mode: int, edges: bool = True) -> int:
    """A canonical address, aligned to 2 MiB, away from the identity-mapped window; also at the edges of
    halves."""
    width = 12 + 9 * LEVELS[mode]
    while True:
        va = rng.getrandbits(width) >> 21 << 21
        if edges and rng.random() < 0.3:
            va = rng.choice((0, (1 << width - 1) - (1 << 21), 1 << width - 1, (1 << width) - (1 << 21)))
        if va >> 30 != 2:
            return va - (va >> width - 1 << width) & (1 << 64) - 1
