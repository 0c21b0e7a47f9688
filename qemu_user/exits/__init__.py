"""What to do when KVM_RUN comes back: one file per exit reason, and the table of them.

run_loop.py makes a vCPU's handlers from it. A new reason is a member of protocol/abi/exits.py, a file here
and a line below.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.abi.exits import Exit
from qemu_user.exits import csr, debug, mmio, sbi, system_event
from qemu_user.exits.context import ExitContext, Handlers

HANDLERS: dict[Exit, Callable[[ExitContext], Callable[[], None]]] = {
    Exit.MMIO: mmio.make,
    Exit.RISCV_SBI: sbi.make,
    Exit.RISCV_CSR: csr.make,
    Exit.SYSTEM_EVENT: system_event.make,
    Exit.DEBUG: debug.make,
}


def handlers(context: ExitContext) -> Handlers:
    """exit reason -> what to call, for one vCPU."""
    return {int(reason): make(context) for reason, make in HANDLERS.items()}
