"""A hart that never enters native code: engine.machine.Hart's API on the reference, for `--accel reference`.

Only `run` differs, and of that only what takes the place of the image's entry. Harts of one machine must all
be of this kind, for the reference is not atomic against native code.
"""

from __future__ import annotations

from kvmcore.engine import hart_state
from kvmcore.engine.exits import ExitKind
from kvmcore.engine.machine import Hart, Machine
from kvmcore.engine.reference import U64, ReferenceHart

_LEAVE = hart_state.ATTENTION_KICK | hart_state.ATTENTION_STOP
_BRIEF = 200
"""Instructions: what native code does in SLICE takes too long here."""
_ATTENTION = hart_state.offset("attention")


class InterpretedHart(Hart):
    """One hart, interpreted in Python: some ten thousand instructions a second."""

    def __init__(self, machine: Machine, index: int, hartid: int) -> None:
        super().__init__(machine, index, hartid)
        self._reference = ReferenceHart(self)
        self._run = self._interpret

    def answer_exits(self, page: int) -> None:
        """Python answers them all."""
        self.state.run_page = page

    def _interpret(self, address: int) -> int:
        """What the image's entry does for native harts: guest code until an exit; the ExitKind."""
        state, machine, reference = self.state, self.machine.state, self._reference
        state.running = 1  # before the look at `stop`: quiesce() does it the other way round
        try:
            if machine.stop:
                return int(ExitKind.STOPPED)
            reference.forget()  # Python may have changed anything since the last exit
            left = _BRIEF if state.attention & hart_state.ATTENTION_BRIEF else -1
            while True:
                if left == 0:
                    self.kick()
                    return int(ExitKind.KICK)
                left -= 1
                attention = state.attention
                if attention:
                    if attention & _LEAVE:
                        return int(ExitKind.KICK)
                    # 64 bits: `running` stands behind it and stays.
                    self.machine.image.atomic_and(self._address + _ATTENTION, ~attention & U64)
                    reference.forget()
                reference.interrupt()
                kind = reference.step()
                if kind != ExitKind.NONE:
                    return kind
        finally:
            state.running = 0
