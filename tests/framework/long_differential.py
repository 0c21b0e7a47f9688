"""The long form of tests/conformance/test_differential.py: new seeds until the time is up. See --help."""

from __future__ import annotations

import argparse
import sys
import time

from tests.framework.assembled_peer import AssembledPeer
from tests.framework.differential import Differential
from tests.framework.engine_peer import EnginePeer
from tests.framework.qemu_peer import QemuPeer
from tests.framework.random_profiles import PROFILES
from tests.framework.random_programs import Program
from tests.framework.translated_peer import TranslatedPeer

BATCH = 50


def main() -> int:
    """Runs; the exit status is 1 if anything differed."""
    parser = argparse.ArgumentParser(description="Compare tier 1 with QEMU on random programs.")
    parser.add_argument("--seconds", type=float, default=600, help="how long (default: 600)")
    parser.add_argument("--first-seed", type=int, default=1000, help="where to begin (default: 1000)")
    parser.add_argument("--profile", choices=list(PROFILES), action="append", help="default: all of them")
    parser.add_argument("--reference", action="store_true", help="compare the reference with tier 1 instead")
    parser.add_argument("--tier2", action="store_true", help="compare tier 1 with tier 2 instead; with --templates, with both")
    parser.add_argument("--templates", action="store_true", help="compare tier 1 with template code instead")
    parser.add_argument("--rounds", type=int, default=1, help="run each program so often on what it has left (inside only)")
    options = parser.parse_args()
    translated = options.tier2 or options.templates
    inside = options.reference or translated
    wanted = options.profile or [name for name in PROFILES if inside or PROFILES[name].qemu]
    length = 15 if options.reference else 60
    left: EnginePeer | QemuPeer
    right = EnginePeer()
    if options.templates:
        left, right = EnginePeer(rounds=options.rounds), AssembledPeer(rounds=options.rounds, regions=options.tier2)
        names = ("tier 1", "templates")
    elif options.tier2:
        left, right = EnginePeer(rounds=options.rounds), TranslatedPeer(rounds=options.rounds)
        names = ("tier 1", "tier 2")
    elif options.reference:
        left, names = EnginePeer(reference=True), ("reference", "tier 1")
    else:
        left, names = QemuPeer(), ("QEMU", "tier 1")
    differential = Differential(left, right, names)
    end = time.monotonic() + options.seconds
    seed, programs, bad = options.first_seed, 0, 0
    batch = 4 if options.reference else BATCH
    while time.monotonic() < end:
        for profile in wanted:
            timeouts, before = differential.timeouts, _retired(left) - right.retired
            failures = differential.compare([Program(seed + i, profile, length) for i in range(batch)])
            programs += batch
            for failure in failures[:3]:
                print(differential.minimise(failure), flush=True)
            bad += len(failures)
            more = _retired(left) - right.retired - before
            if translated and not failures and differential.timeouts == timeouts and more:
                print(f"{profile} {seed}: tier 1 counts {more} more instructions retired", flush=True)
                bad += 1
        seed += batch
    done = f", {right.retired} instructions" if inside else ""
    print(f"{programs} programs{done}, {bad} differ, {differential.timeouts} without an end; next seed {seed}")
    if isinstance(left, QemuPeer):
        left.close()
    return 1 if bad else 0


def _retired(peer: EnginePeer | QemuPeer) -> int:
    return peer.retired if isinstance(peer, EnginePeer) else 0


if __name__ == "__main__":
    sys.exit(main())
