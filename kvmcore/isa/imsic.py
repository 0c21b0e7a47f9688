"""The IMSIC's registers as a hart sees them: siselect, sireg, stopei (AIA specification, chapter 3).

State lives in the hart; MSIs set bits of eip from any thread. Called by csrs.py and traps.py.
"""

from __future__ import annotations

from kvmcore.ir.value import Value, select, u64
from kvmcore.isa.hart import Hart

IPRIO0, IPRIO15, EIDELIVERY, EITHRESHOLD, EIP0, EIE0 = 0x30, 0x3F, 0x70, 0x72, 0x80, 0xC0
#: 64-bit words that identities can fill.
WORDS = 32


def top(h: Hart) -> Value:
    """The lowest pending and enabled identity below the threshold, or 0 (3.8: stopei's identity)."""
    last = h.get("imsic_identities") >> 6
    for index in range(WORDS):
        if last < index:
            break
        word = h.get_at("eip", index) & h.get_at("eie", index)
        if word != 0:
            identity = word.ctz() + 64 * index
            threshold = h.get("eithreshold")
            held = (threshold != 0) & (identity >= threshold)
            return select(held, u64(0), identity)
    return u64(0)


def deliverable(h: Hart) -> Value:
    """As `top`, but 0 unless eidelivery is on: whether SEIP is raised."""
    if h.get("eidelivery") != 1:
        return u64(0)
    return h.routine(top)


def claim(h: Hart) -> Value:
    """stopei written: clear the top identity's pending bit; what stopei read before."""
    identity = h.routine(top)
    if identity == 0:
        return identity
    h.atomic_and("eip", ~(u64(1) << (identity & 63)), identity >> 6)
    return identity | (identity << 16)


def valid(selected: Value) -> Value:
    """1-bit: whether siselect names a register that S-mode has on RV64 (AIA 2.2, 3.8): even numbers only."""
    priorities = (selected >= IPRIO0) & (selected <= IPRIO15)
    array = (selected >= EIP0) & (selected < EIE0 + 64)
    fixed = (selected == EIDELIVERY) | (selected == EITHRESHOLD)
    return (priorities | array | fixed) & ~selected.bit(0)


def read(h: Hart) -> Value:
    """The register that siselect names (valid). Priorities of major interrupts are fixed: 0 (5.4.1)."""
    number = h.get("siselect")
    if number < EIDELIVERY:
        return u64(0)
    if number == EIDELIVERY:
        return h.get("eidelivery")
    if number == EITHRESHOLD:
        return h.get("eithreshold")
    word = (number & 63) >> 1
    if number < EIE0:
        return h.get_at("eip", word)
    return h.get_at("eie", word)


def change(h: Hart, value: Value, mask: Value) -> Value:
    """Give the bits of `mask` those of `value`; the old content.

    What does not exist, and identity 0, stays 0. MSIs set bits of eip at any moment: those that `mask` leaves
    alone must not be lost.
    """
    number = h.get("siselect")
    if number < EIDELIVERY:
        return u64(0)
    identities = h.get("imsic_identities")
    if number < EIP0:
        name = "eidelivery" if number == EIDELIVERY else "eithreshold"
        old = h.get(name)
        limit = u64(1) if name == "eidelivery" else identities
        h.set(name, ((old & ~mask) | (value & mask)) & limit)
        return old
    word = (number & 63) >> 1
    bits = mask & select(word == 0, u64(~1), u64(-1))
    bits = select(word <= (identities >> 6), bits, u64(0))
    name = "eip" if number < EIE0 else "eie"
    old = h.atomic_and(name, value | ~bits, word)
    h.atomic_or(name, value & bits, word)
    return old
