"""KVM_EXIT_DEBUG: an ebreak while guest debugging is on. Nobody turns it on here yet, so it ends the VM
with a word.
"""

from __future__ import annotations

from collections.abc import Callable

from qemu_user.exits.context import ExitContext


def make(context: ExitContext) -> Callable[[], None]:
    """The handler of one vCPU."""
    return lambda: context.fail(f"CPU {context.cpu} stopped at a breakpoint that no debugger set")
