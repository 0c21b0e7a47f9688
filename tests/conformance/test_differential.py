"""Random programs leave the same state on QEMU, on tier 1 and on the reference; no instruction is left out.

The seeds are fixed, so a run repeats exactly; scripts/long-differential goes on with other seeds for as
long as one likes. A failure prints the smallest program that shows it, as assembly.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmcore.isa.table import INSTRUCTIONS
from tests.framework import qemu_peer
from tests.framework.assembled_peer import AssembledPeer
from tests.framework.differential import Differential
from tests.framework.engine_peer import EnginePeer
from tests.framework.random_profiles import PROFILES
from tests.framework.random_programs import Program
from tests.framework.translated_peer import TranslatedPeer

PROGRAMS = 100
TIER2_PROGRAMS, BOTH_PROGRAMS = 25, 5
REFERENCE_PROGRAMS, REFERENCE_LENGTH = 6, 8
WITH_QEMU = [name for name, profile in PROFILES.items() if profile.qemu]


@pytest.fixture(scope="module")
def qemu() -> Iterator[qemu_peer.QemuPeer]:
    if not qemu_peer.available():
        pytest.skip("needs qemu-system-riscv64 (apt install qemu-system-misc)")
    with qemu_peer.QemuPeer() as peer:
        yield peer


@pytest.fixture(scope="module")
def tier1() -> EnginePeer:
    return EnginePeer()


@pytest.fixture(scope="module")
def reference() -> EnginePeer:
    return EnginePeer(reference=True)


@pytest.fixture(scope="module")
def tier2() -> TranslatedPeer:
    return TranslatedPeer()


@pytest.fixture(scope="module")
def templates() -> AssembledPeer:
    return AssembledPeer()


@pytest.fixture(scope="module")
def both() -> AssembledPeer:
    return AssembledPeer(regions=True)


def check(differential: Differential, programs: list[Program]) -> None:
    """Fails with the minimised first program whose outcomes differ."""
    failures = differential.compare(programs)
    if failures:
        count = f"{len(failures)} of {len(programs)} programs differ; the first:\n"
        pytest.fail(count + str(differential.minimise(failures[0])), pytrace=False)
    assert differential.timeouts <= max(1, len(programs) // 20)


@pytest.mark.qemu
@pytest.mark.parametrize("profile", WITH_QEMU)
def test_tier1_equals_qemu(profile: str, qemu: qemu_peer.QemuPeer, tier1: EnginePeer) -> None:
    programs = [Program(seed, profile) for seed in range(PROGRAMS)]
    check(Differential(qemu, tier1, ("QEMU", "tier 1")), programs)


@pytest.mark.parametrize("profile", PROFILES)
def test_reference_equals_tier1(profile: str, tier1: EnginePeer, reference: EnginePeer) -> None:
    programs = [Program(seed, profile, REFERENCE_LENGTH) for seed in range(REFERENCE_PROGRAMS)]
    check(Differential(reference, tier1, ("reference", "tier 1")), programs)


@pytest.mark.parametrize("profile", PROFILES)
def test_tier2_equals_tier1(profile: str, tier1: EnginePeer, tier2: TranslatedPeer) -> None:
    programs = [Program(seed, profile) for seed in range(TIER2_PROGRAMS)]
    before = tier2.regions.installed
    check(Differential(tier1, tier2, ("tier 1", "tier 2")), programs)
    assert tier2.regions.installed > before


@pytest.mark.parametrize("profile", PROFILES)
def test_templates_equal_tier1(profile: str, tier1: EnginePeer, templates: AssembledPeer) -> None:
    programs = [Program(seed, profile) for seed in range(PROGRAMS)]
    before = templates.templates.installed
    check(Differential(tier1, templates, ("tier 1", "templates")), programs)
    assert templates.templates.installed > before


@pytest.mark.parametrize("profile", PROFILES)
def test_templates_and_regions_equal_tier1(profile: str, tier1: EnginePeer, both: AssembledPeer) -> None:
    programs = [Program(seed, profile) for seed in range(BOTH_PROGRAMS)]
    before = both.regions.installed
    check(Differential(tier1, both, ("tier 1", "templates and tier 2")), programs)
    assert both.regions.installed > before


def test_every_instruction_is_generated() -> None:
    """In the programs of the tests above; an instruction added to the table has to be added to the
    generator."""
    names: set[str] = set()
    for profile in PROFILES:
        for seed in range(PROGRAMS):
            for item in Program(seed, profile).items:
                names |= item.names
    assert {row.name for row in INSTRUCTIONS} - names == set()
