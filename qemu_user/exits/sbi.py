"""KVM_EXIT_RISCV_SBI: SBI calls that kvmcore forwards, of which we know the debug console (DBCN, SBI 2.0
chapter 12).

Lengths and addresses are the guest's: one call moves at most a page (the specification lets a call do less),
and a range outside RAM is INVALID_PARAM. Everything else stays NOT_SUPPORTED, as kvmcore preset it.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.abi import run_page
from protocol.abi import structs_riscv as riscv
from qemu_user.devices.memory import OutOfRange
from qemu_user.exits.context import ExitContext

WRITE, READ, WRITE_BYTE = 0, 1, 2
MOST = 4096


def make(context: ExitContext) -> Callable[[], None]:
    """The handler of one vCPU."""
    page = context.page

    def handle() -> None:
        extension, function, *arguments = run_page.SBI.unpack_from(page, run_page.UNION)[:8]
        error, value = riscv.SBI_NOT_SUPPORTED, 0
        if extension == riscv.SBI_DBCN:
            error, value = debug_console(context, function, arguments)
        else:
            context.counters.count("unknown_sbi_calls")
        page[run_page.SBI_RET : run_page.SBI_RET + 16] = (error & (1 << 64) - 1).to_bytes(
            8, "little"
        ) + value.to_bytes(8, "little")

    return handle


def debug_console(context: ExitContext, function: int, arguments: list[int]) -> tuple[int, int]:
    """(error, value) of a DBCN call."""
    if function == WRITE_BYTE:
        context.console.write(bytes((arguments[0] & 0xFF,)))
        return riscv.SBI_SUCCESS, 0
    if function not in (WRITE, READ):
        return riscv.SBI_NOT_SUPPORTED, 0
    count, gpa = min(arguments[0], MOST), arguments[1] | arguments[2] << 64
    try:
        view = context.memory.view(gpa, count)
    except OutOfRange:
        return riscv.SBI_INVALID_PARAM, 0
    if function == WRITE:
        return riscv.SBI_SUCCESS, context.console.write(view)
    data = context.console.read(count)
    view[: len(data)] = data
    context.memory.wrote(gpa, len(data))
    return riscv.SBI_SUCCESS, len(data)
