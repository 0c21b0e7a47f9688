"""Runs a few instructions on tier 1 and on the reference, and looks at what they left."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmcore.engine.exits import ExitKind
from kvmcore.engine.hart_state import HartState
from kvmcore.engine.loader import Image
from kvmcore.engine.machine import Hart
from kvmcore.engine.reference_hart import InterpretedHart
from tests.framework.bare_guest import Guest

_FRAME = """
    la t6, handler
    csrw stvec, t6
    {body}
    li a7, 0
    ecall
    .balign 4
handler:
    li a7, 1
    ecall
"""


class Ran:
    """What a snippet left. `cause`: scause if it trapped, else None."""

    def __init__(self, guest: Guest, kind: ExitKind) -> None:
        self.guest, self.kind = guest, kind
        self.hart = guest.harts[0]
        self.state: HartState = self.hart.state
        self.cause: int | None = int(self.state.scause) if self.state.x[17] == 1 else None

    def x(self, number: int) -> int:
        return int(self.state.x[number])


Execute = Callable[..., Ran]


@pytest.fixture(params=[Hart, InterpretedHart], ids=["tier1", "reference"])
def execute(request: pytest.FixtureRequest) -> Execute:
    """execute(text, prepare): run assembly in S-mode until it ends, traps, or leaves otherwise.

    prepare(hart) may change the hart before it starts.
    """

    def run(body: str, prepare: Callable[[Hart], object] = lambda hart: None) -> Ran:
        guest = Guest(Image.load(), _FRAME.format(body=body), kind=request.param)
        guest.harts[0].state.fs = 1
        prepare(guest.harts[0])
        return Ran(guest, guest.run(5))

    return run


USER = """
    la t5, user
    csrw sepc, t5
    li t5, 0x100
    csrc sstatus, t5
    sret
user:
"""
"""The rest of a snippet runs in U-mode; it must end by a trap."""
