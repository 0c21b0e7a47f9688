"""What KVM_RUN says when the guest cannot go on: an errno instead of an exit, or a reason that we do not
know.

Called by run_loop.py, on the vCPU's thread, for every failure but EINTR. Makes one sentence of it for the
user.
"""

from __future__ import annotations

import errno

from protocol.abi.errors import KvmError
from qemu_user.exits.context import ExitContext

_MEANINGS = {
    errno.EIO: "an access to a device register that is not aligned",
    errno.EOPNOTSUPP: "an atomic, floating-point or unknown instruction on a device register",
    errno.EFAULT: "an access to memory that is not there",
}
_GONE = (errno.ECONNRESET, errno.EPIPE, errno.ECONNREFUSED, errno.ESTALE, errno.ENODEV, errno.EBADF)


def describe(error: KvmError, alive: bool, where: str) -> str:
    """`alive`: the VM process still runs; `where`: the program counter in words."""
    if not alive or error.errno in _GONE:
        return f"its kvmcore process is gone ({error})"
    meaning = _MEANINGS.get(error.errno or 0, "an error of kvmcore")
    return f"the guest did something that cannot be emulated{where}: {meaning} ({error})"


def unknown_exit(context: ExitContext, reason: int) -> None:
    """An exit reason without a handler."""
    context.fail(f"CPU {context.cpu} left the guest for reason {reason}, which is not known here")
