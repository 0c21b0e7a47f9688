"""query-cpus-fast: the vCPUs, without disturbing them."""

from __future__ import annotations

from typing import Any

from qemu_user.machine.machine import Machine
from qemu_user.management.commands.command import Arguments, Command, Result


class CpuInfoFast(Result, frozen=True, kw_only=True):
    """QMP's CpuInfoFast."""

    cpu_index: int
    qom_path: str
    thread_id: int
    props: dict[str, Any]
    target: str = "riscv64"


def run(machine: Machine, arguments: Arguments) -> list[CpuInfoFast]:
    """One entry per vCPU; thread-id is that of our thread that runs it."""
    return [
        CpuInfoFast(
            cpu_index=index,
            qom_path=f"/machine/cpu[{index}]",
            thread_id=thread.thread_id,
            props={"core-id": index},
        )
        for index, thread in enumerate(machine.threads)
    ]


COMMAND = Command("query-cpus-fast", run, "the VM's vCPUs")
