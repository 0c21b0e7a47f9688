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
from typing import Any, NamedTuple

from kvmcore.vm.objects import Deferred, Handle
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import UNKNOWN_ERRNO, find

Handler = Callable[[Any, Any], Any]

#: kvm_riscv_aia's ioctl and the regular files (guest_memfd, statistics) know no KVM request at all.
_UNKNOWN = {kind: int(getattr(errno, name)) for kind, name in UNKNOWN_ERRNO.items()}


class _Plan(NamedTuple):
    """What an ioctl takes, looked up once: the function, the bytes that are copied in and what makes a record of them."""

    handler: Handler
    size: int
    parse: Callable[[bytes], Any] | None
    name: str
    extension: bool


def call(handle: Handle, request: int, arg: int) -> int | Deferred:
    """Perform `request` on `handle`. The result is ioctl(2)'s: >= 0. KvmError carries the errno.

    vCPU requests: the caller holds the vCPU's mutex. Inline pointees: the caller has overlaid them.
    """
    if handle.dead:
        raise KvmError(errno.EIO, reason="the VM is dead")
    kind = handle.kind
    plan = _plans.get((kind, request)) or _plan(kind, request)
    if plan is None or (plan.extension and not handle.session.compat.extended):
        raise KvmError(_UNKNOWN.get(kind, errno.ENOTTY), name_of(kind, request), "unknown request")
    handler, size, parse, name, _ = plan
    try:
        result = handler(handle, arg if parse is None else parse(handle.session.mm.copy_from_user(arg, size)))
        return result if type(result) is int else _deliver(handle, arg, result)
    except KvmError as error:
        error.ioctl = error.ioctl or name
        raise


def _deliver(handle: Handle, arg: int, result: Any) -> int | Deferred:
    """What a handler gives (kvmcore/vm/objects.py), as ioctl(2)'s value."""
    if result is None:
        return 0
    if isinstance(result, Handle):
        return handle.session.install(result)
    if isinstance(result, (bytes, bytearray)):
        handle.session.mm.copy_to_user(arg, bytes(result))
        return 0
    if isinstance(result, Deferred):
        return result
    return int(result)


_plans: dict[tuple[str, int], _Plan] = {}
"""What _plan() has found. Requests that are unknown are not kept: there are too many of them."""


def _plan(kind: str, request: int) -> _Plan | None:
    row = find(kind, request)
    handler = _handler(kind, row.function) if row is not None else None
    if row is None or handler is None:
        return None
    layout = row.argument if row.copies_in else None
    made = _Plan(handler, layout.size if layout else 0, layout.parse if layout else None, row.name, row.extension)
    _plans[kind, request] = made
    return made


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
            _plan(kind, row.number)
        if row.argument is not None:
            row.argument.parse(bytes(row.argument.size))
