"""KVM_EXIT_MMIO: an access that no memslot, ioeventfd or in-kernel device answered goes to the bus.

The hottest Python of the process: offsets and struct.Struct only. A load's value goes back in kvm_run's data,
and the next KVM_RUN completes the instruction.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from protocol.abi import run_page
from qemu_user.exits.context import ExitContext

_unpack = run_page.MMIO.unpack_from
_MASKS = {size: (1 << 8 * size) - 1 for size in (1, 2, 4, 8)}


def make(context: ExitContext) -> Callable[[], None]:
    """The handler of one vCPU."""
    page, bus = context.page, context.bus
    union, data_at, done = run_page.UNION, run_page.MMIO_DATA, context.done

    def handle() -> None:
        gpa, data, length, is_write = _unpack(page, union)
        if done is not None:
            device = bus.device(gpa, length)
            with device.lock if device is not None else nullcontext():
                access(gpa, data, length, is_write)
                done(context.cpu, device)
        else:
            access(gpa, data, length, is_write)

    def access(gpa: int, data: bytes, length: int, is_write: int) -> None:
        if is_write:
            bus.write(gpa, length, int.from_bytes(data[:length], "little"))
        else:
            value = bus.read(gpa, length) & _MASKS[length]
            page[data_at : data_at + 8] = value.to_bytes(8, "little")

    return handle
