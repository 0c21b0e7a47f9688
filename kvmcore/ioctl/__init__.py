"""Dispatch: joins the rows of protocol/abi/ioctls.py to the functions of kvmcore/ioctl/<handle kind>.py.

Called by kvmcore/server/router.py with a handle of the caller's own session. Does what Linux does before an ioctl's
own code runs, in its order (KVM_ABI 1.1): dead VM, unknown request, copy-in; and the copy-out after it. The full 32-bit
request selects the row. Must never know of frames: arguments and pointees come through the session's address space.
"""

from __future__ import annotations

import errno
import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

from kvmcore.vm.objects import Deferred, Handle
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import UNKNOWN_ERRNO, Ioctl, find

Handler = Callable[[Any, Any], Any]

#: kvm_riscv_aia's ioctl and the regular files (guest_memfd, statistics) know no KVM request at all.
_UNKNOWN = {kind: int(getattr(errno, name)) for kind, name in UNKNOWN_ERRNO.items()}


def call(handle: Handle, request: int, arg: int) -> int | Deferred:
    """Perform `request` on `handle`. The result is ioctl(2)'s: >= 0. KvmError carries the errno.

    vCPU requests: the caller holds the vCPU's mutex. Inline pointees: the caller has overlaid them.
    """
    kind = handle.kind
    if getattr(getattr(handle, "vm", handle), "dead", False):
        raise KvmError(errno.EIO, reason="the VM is dead")
    row, handler = _found.get((kind, request)) or _find(kind, request)
    if row is None or handler is None or (row.extension and not handle.session.compat.extended):
        raise KvmError(_UNKNOWN.get(kind, errno.ENOTTY), name_of(kind, request), "unknown request")
    try:
        return _perform(row, handler, handle, arg)
    except KvmError as error:
        error.ioctl = error.ioctl or row.name
        raise


def _perform(row: Ioctl, handler: Handler, handle: Handle, arg: int) -> int | Deferred:
    mm = handle.session.mm
    layout = row.argument
    argument: Any = arg
    if layout is not None and row.copies_in:
        raw = mm.copy_from_user(arg, layout.size)
        if not row.tail:
            argument = layout.parse(raw)
    result = handler(handle, argument)
    if isinstance(result, Handle):
        return handle.session.install(result)
    if isinstance(result, (bytes, bytearray)):
        mm.copy_to_user(arg, bytes(result))
        return 0
    if isinstance(result, Deferred):
        return result
    return int(result or 0)


_found: dict[tuple[str, int], tuple[Ioctl, Handler]] = {}
"""What _find() has found. Requests that are unknown are not kept: there are too many of them."""


def _find(kind: str, request: int) -> tuple[Ioctl | None, Handler | None]:
    row = find(kind, request)
    handler = _handler(kind, row.function) if row is not None else None
    if row is not None and handler is not None:
        _found[kind, request] = row, handler
    return row, handler


@cache
def _handler(kind: str, function: str) -> Handler | None:
    """The function of a row; None when this kind of handle has none (the row then answers as an unknown request)."""
    module = importlib.import_module(f"kvmcore.ioctl.{kind}")
    handler: Handler | None = getattr(module, function, None)
    return handler


def name_of(kind: str, request: int) -> str:
    """How errors and logs call a request: its KVM name, or the number in hexadecimal."""
    row = find(kind, request)
    return row.name if row is not None else f"{request & 0xFFFFFFFF:#010x}"


def preload() -> None:
    """Import every handler and compile every struct now, so that processes forked from here start warm."""
    from protocol.abi.ioctls import IOCTLS

    for row in IOCTLS:
        for kind in row.on:
            _find(kind, row.number)
        if row.argument is not None:
            row.argument.parse(bytes(row.argument.size))
