"""All checks, in the order of the recording."""

from __future__ import annotations

from . import aia_checks, api_checks, run_checks
from .port import Port
from .record import Record

STEPS = (
    api_checks.system,
    api_checks.capabilities,
    api_checks.eventfds,
    api_checks.vcpus,
    run_checks.mapping,
    run_checks.mmio,
    run_checks.sbi,
    run_checks.traps,
    run_checks.dirty,
    run_checks.dirty_ring,
    run_checks.posted_writes,
    run_checks.waiting,
    run_checks.lost_memory,
    aia_checks.attributes,
    aia_checks.interrupts,
    run_checks.speed,
    run_checks.seed,
    run_checks.hart_states,
    run_checks.user_mode,
    run_checks.handles,
    lambda port, say: say("DONE"),
    run_checks.forged_page,
    run_checks.limits,
    lambda port, say: say("DONE"),
)


def replay(port: Port) -> Record:
    """What this kvmcore answers."""
    record = Record()
    for step in STEPS:
        step(port, record.say)
    return record
