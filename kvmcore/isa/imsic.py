"""The IMSIC's registers as a hart sees them: siselect, sireg, stopei (AIA specification, chapter 3).

State lives in the hart; MSIs set bits of eip from any thread. Called by csrs.py and traps.py.
"""

from __future__ import annotations

from kvmcore.ir.value import Value, select, u64
from kvmcore.isa.hart import Hart

EIDELIVERY, EITHRESHOLD, EIP0, EIE0 = 0x70, 0x72, 0x80, 0xC0
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


def valid(select_value: Value, identities: Value) -> Value:
    """1-bit: whether siselect names a register: only even numbers on RV64, words that exist."""
    fixed = (select_value == EIDELIVERY) | (select_value == EITHRESHOLD)
    array = (select_value >= EIP0) & (select_value < EIE0 + 64) & ((select_value & 1) == 0)
    return fixed | array


def read(h: Hart) -> Value:
    """The register that siselect names (valid)."""
    number = h.get("siselect")
    if number == EIDELIVERY:
        return h.get("eidelivery")
    if number == EITHRESHOLD:
        return h.get("eithreshold")
    word = (number & 63) >> 1
    if number < EIE0:
        return h.get_at("eip", word)
    return h.get_at("eie", word)


def write(h: Hart, value: Value) -> None:
    """Write it; identities that do not exist, and identity 0, stay 0."""
    number = h.get("siselect")
    if number == EIDELIVERY:
        h.set("eidelivery", value & 1)
        return
    identities = h.get("imsic_identities")
    if number == EITHRESHOLD:
        h.set("eithreshold", value & identities)
        return
    word = (number & 63) >> 1
    value = value & select(word == 0, u64(~1), u64(-1))
    value = select(word <= (identities >> 6), value, u64(0))
    if number < EIE0:
        # Bits that an MSI sets meanwhile must not be lost: set and clear, atomically.
        h.atomic_or("eip", value, word)
        h.atomic_and("eip", value, word)
        return
    h.set_at("eie", word, value)
