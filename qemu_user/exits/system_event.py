"""KVM_EXIT_SYSTEM_EVENT: the guest asked SBI (SRST) to shut down or to reset. All vCPUs are stopped by
then.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.abi import run_page
from protocol.abi.exits import SystemEvent
from qemu_user.exits.context import ExitContext


def make(context: ExitContext) -> Callable[[], None]:
    """The handler of one vCPU. A shutdown for the reason "system failure" (data[0] = 1) is exit status 1."""

    def handle() -> None:
        kind, count, reason = run_page.SYSTEM_EVENT.unpack_from(context.page, run_page.UNION)
        if kind == SystemEvent.RESET:
            context.power("reset", 0)
        else:
            context.power("shutdown", 1 if count and reason == 1 else 0)

    return handle
