"""KVM_EXIT_MMIO: an access that no memslot, ioeventfd or in-kernel device answered goes to the bus.

The hottest Python of the process: offsets and struct.Struct only. A load's value goes back in kvm_run's data,
and the next KVM_RUN completes the instruction.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from protocol.abi import run_page
from qemu_user.exits.context import ExitContext

_unpack, _answer = run_page.MMIO_WORDS.unpack_from, run_page.U64.pack_into
_MASKS = {size: (1 << 8 * size) - 1 for size in (1, 2, 4, 8)}


def make(context: ExitContext) -> Callable[[], None]:
    """The handler of one vCPU."""
    page, bus = context.page, context.bus
    union, data_at, done = run_page.UNION, run_page.MMIO_DATA, context.done

    def handle() -> None:
        gpa, data, length, is_write = _unpack(page, union)
        if is_write:
            bus.write(gpa, length, data & _MASKS[length])
        else:
            _answer(page, data_at, bus.read(gpa, length) & _MASKS[length])

    def handle_and_note() -> None:
        gpa, _, length, _ = _unpack(page, union)
        device = bus.device(gpa, length)
        with device.lock if device is not None else nullcontext():
            handle()
            assert done is not None
            done(context.cpu, device)

    return handle if done is None else handle_and_note
