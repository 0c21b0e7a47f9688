"""KVM_EXIT_RISCV_CSR: CSRs that user space answers: Zkr's `seed` (entropy source, scalar cryptography 4.1).

The others that come here (AIA CSRs of a VM without AIA) read as zero, as an interrupt file with nothing in
it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from protocol.abi import run_page
from qemu_user.exits.context import ExitContext

SEED = 0x015
_ENTROPY_16 = 0b10 << 30
"""OPST = ES16: bits 15:0 are 16 bits of entropy."""


def make(context: ExitContext) -> Callable[[], None]:
    """The handler of one vCPU."""
    page = context.page

    def handle() -> None:
        number = int.from_bytes(page[run_page.CSR_NUM : run_page.CSR_NUM + 8], "little")
        value = 0
        if number == SEED:
            value = _ENTROPY_16 | int.from_bytes(os.getrandom(2), "little")
        else:
            context.counters.count("unknown_csr_accesses")
        page[run_page.CSR_RET_VALUE : run_page.CSR_RET_VALUE + 8] = value.to_bytes(8, "little")

    return handle
