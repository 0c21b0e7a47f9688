"""A machine that a VM has used is given to the next one of the process: nothing tells it from a new one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from kvmcore.engine.exits import ExitKind
from kvmcore.engine.loader import Image
from kvmcore.engine.machine import Hart, Machine, SlotView
from tests.framework.bare_guest import RAM, SIZE, Guest

STORES = """
    li t0, 0x80002000
    li t1, 0x10000000
    addi a1, a1, 7
    sd a1, 0(t0)
    sw a1, 0(t1)
"""
_OWN = {"gate", "_open", "_block", "_pool", "_no_slot", "state"}
"""Attributes that each machine has of its own, and which hold nothing of a guest."""
_ADDRESSES = {"pool", "main_slot"}
"""Fields of the block that say where its own memory is."""


def contents(machine: Machine) -> dict[str, object]:
    """All that it is: attributes, the block's fields."""
    found = {name: value for name, value in vars(machine).items() if name not in _OWN}
    for name in ("_slots", "_imsics"):
        found[name] = bytes(found[name])
    for name, *_ in machine.state._fields_:
        value = getattr(machine.state, name)
        if name not in _ADDRESSES:
            found[f"state.{name}"] = bytes(value) if isinstance(value, ctypes.Array) else value
    return found


def run(machine: Machine, guest: Guest) -> tuple[int, int]:
    """`guest`'s memory on `machine`: how the first hart leaves, and what it has stored."""
    with machine.quiesce():
        machine.set_slots([SlotView(RAM, SIZE, guest.address)])
    hart = Hart(machine, 0, 0)
    hart.state.pc = RAM
    return hart.run(), guest[0x80002000]


def test_a_renewed_machine_is_a_new_one(image: Image, guest: Callable[..., Guest]) -> None:
    used = guest(STORES, harts=2)
    machine = used.machine
    assert used.run() == ExitKind.MMIO_WRITE
    assert machine.state.pool_used > 0
    machine.set_imsics({0x2800_0000: used.harts[0]})
    machine.set_aplic(0xC00_0000)
    machine.set_bus([(0x1000_0000, 4, 1, 0, 3)], 0)
    machine.set_time(12345)
    machine.flushes_of_pool = machine.pages_given_up = 9
    assert contents(machine) != contents(Machine(image))
    machine.renew()
    new = Machine(image)
    assert contents(machine) == contents(new)
    other = guest(STORES)
    assert run(machine, other) == (ExitKind.MMIO_WRITE, 7)
    assert machine.state.harts == 1
