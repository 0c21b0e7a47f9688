"""Counters of a VM and of its vCPUs, and the file of KVM_GET_STATS_FD (KVM_ABI 1.12).

What native code counts too stands in the hart's block, the rest are attributes that exits.py adds to. The file
is the binary format of
<linux/kvm.h>: header, id, descriptors, data; each read sees the counters of that moment. Nothing here slows
an exit down: no locks, no names looked up.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmcore.engine.hart_state import BY_NAME as HART_FIELDS
from kvmcore.engine.hart_state import SLICE
from kvmcore.vm.objects import StatsBase
from protocol.abi import structs

if TYPE_CHECKING:
    from kvmcore.engine.machine import Hart, Machine
    from kvmcore.vm.vcpu import Vcpu
    from kvmcore.vm.vm import Vm

NAME_SIZE = 48
HIST_BUCKETS = 32
_CUMULATIVE, _INSTANT, _LOG_HIST = 0, 1, 4
_NO_UNIT, _BYTES, _SECONDS, _BOOLEAN = 0x00, 0x10, 0x20, 0x40
_POW10 = 0x000


class Statistic(NamedTuple):
    """One descriptor: its name (also the attribute's), kvm_stats_desc's flags, exponent and number of u64s.
    """

    name: str
    flags: int = _CUMULATIVE | _NO_UNIT | _POW10
    exponent: int = 0
    size: int = 1


def _nanoseconds(name: str) -> Statistic:
    return Statistic(name, _CUMULATIVE | _SECONDS | _POW10, -9)


def _histogram(name: str) -> Statistic:
    return Statistic(name, _LOG_HIST | _SECONDS | _POW10, -9, HIST_BUCKETS)


def _bytes(name: str) -> Statistic:
    return Statistic(name, _INSTANT | _BYTES | _POW10)


VM_STATISTICS = (Statistic("remote_tlb_flush"), Statistic("remote_tlb_flush_requests"))
VCPU_STATISTICS = (
    Statistic("halt_successful_poll"),
    Statistic("halt_attempted_poll"),
    Statistic("halt_poll_invalid"),
    Statistic("halt_wakeup"),
    _nanoseconds("halt_poll_success_ns"),
    _nanoseconds("halt_poll_fail_ns"),
    _nanoseconds("halt_wait_ns"),
    _histogram("halt_poll_success_hist"),
    _histogram("halt_poll_fail_hist"),
    _histogram("halt_wait_hist"),
    Statistic("blocking", _INSTANT | _BOOLEAN | _POW10),
    Statistic("ecall_exit_stat"),
    Statistic("wfi_exit_stat"),
    Statistic("wrs_exit_stat"),
    Statistic("mmio_exit_user"),
    Statistic("mmio_exit_kernel"),
    Statistic("csr_exit_user"),
    Statistic("csr_exit_kernel"),
    Statistic("signal_exits"),
    Statistic("exits"),
    Statistic("instr_illegal_exits"),
    Statistic("load_misaligned_exits"),
    Statistic("store_misaligned_exits"),
    Statistic("load_access_exits"),
    Statistic("store_access_exits"),
)
LINUX_6_12_VCPU_STATISTICS = VCPU_STATISTICS[:20]
"""Linux 6.12 ends with `exits`."""

_ENGINE_FIELDS = {
    "guest_instructions": "icount",
    "tlb_misses": "count_fill",
    "fetch_tlb_misses": "count_fetch_fill",
    "tlb_flushes": "count_flush",
    "guest_traps": "count_trap",
}
"""Statistic -> the field of the hart's block that counts it."""
ENGINE_STATISTICS = tuple(map(Statistic, _ENGINE_FIELDS))
"""Of a vCPU, and of a VM the sums; ours, so only Compat.DEFAULT shows them (docs/deviations.md)."""
_EXITS = ("exits", "ecall_exit_stat", "wfi_exit_stat", "mmio_exit_user", "mmio_exit_kernel", "csr_exit_user", "signal_exits")
OWN_VM_STATISTICS = (
    *ENGINE_STATISTICS,
    *map(Statistic, _EXITS),
    Statistic("emulated_instructions"),
    Statistic("decoded_pages"),
    Statistic("decoded_pages_given_up"),
    _bytes("decoded_bytes"),
    _bytes("code_bytes"),
    Statistic("assembled_pages"),
    Statistic("regions"),
    Statistic("regions_ready_made"),
    Statistic("regions_translated"),
    _nanoseconds("translation_ns"),
    Statistic("host_regions_translated"),
    _nanoseconds("host_translation_ns"),
    Statistic("host_regions_waiting", _INSTANT | _NO_UNIT | _POW10),
    _bytes("host_arena_bytes"),
    _bytes("host_template_bytes"),
)
"""Of a VM: what its vCPUs have done together, its code, and what the host's translator last said of itself."""
_EVERY_VCPU_STATISTIC = (*VCPU_STATISTICS, *ENGINE_STATISTICS)
_EVERY_VM_STATISTIC = (*VM_STATISTICS, *OWN_VM_STATISTICS)
_COUNTED_HERE = [statistic for statistic in VCPU_STATISTICS if statistic.name not in HART_FIELDS]
_ZEROS = {statistic.name: 0 for statistic in _COUNTED_HERE if statistic.size == 1}
_EMPTY = [(statistic.name, statistic.size) for statistic in _COUNTED_HERE if statistic.size > 1]


class VmStats:
    """Counters of a VM. A remote flush is one RFENCE or memslot change that reached other harts."""

    def __init__(self) -> None:
        self.remote_tlb_flush = 0
        self.remote_tlb_flush_requests = 0


class _InHart:
    """A counter that is a field of the hart's block."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, stats: VcpuStats, owner: type) -> int:
        return int(getattr(stats.hart.state, self._name))

    def __set__(self, stats: VcpuStats, value: int) -> None:
        setattr(stats.hart.state, self._name, value)


class VcpuStats:
    """Counters of a vCPU. Traps that the guest handles itself (illegal, misaligned, access) never leave native code and
    are not counted, nor is how long single polls before a halt took.
    """

    def __init__(self, hart: Hart) -> None:
        self.hart = hart
        self.__dict__.update(_ZEROS)
        for name, size in _EMPTY:
            self.__dict__[name] = [0] * size

    halt_successful_poll = _InHart()
    halt_attempted_poll = _InHart()
    halt_poll_success_ns = _InHart()
    halt_poll_fail_ns = _InHart()
    halt_wakeup = _InHart()
    halt_wait_ns = _InHart()
    blocking = _InHart()
    wfi_exit_stat = _InHart()
    mmio_exit_user = _InHart()
    mmio_exit_kernel = _InHart()
    exits = _InHart()
    ecall_exit_stat: int
    csr_exit_user: int
    csr_exit_kernel: int
    signal_exits: int

    @property
    def halt_wait_hist(self) -> list[int]:
        return list(self.hart.state.halt_wait_hist)

    def halted(self, nanoseconds: int) -> None:
        """The vCPU slept this long in WFI and was woken."""
        self.halt_wakeup += 1
        self.halt_wait_ns += nanoseconds
        self.hart.state.halt_wait_hist[min(nanoseconds.bit_length(), HIST_BUCKETS - 1)] += 1


class VcpuFigures:
    """VcpuStats, and what the engine counts in the hart's block."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu

    def __getattr__(self, name: str) -> Any:
        return _engine_figure(self._vcpu.hart, name) if name in _ENGINE_FIELDS else getattr(self._vcpu.stats, name)


class VmFigures:
    """VmStats, sums over the vCPUs, and what the engine knows of the VM's code."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    def __getattr__(self, name: str) -> Any:
        vm = self._vm
        if name in _ENGINE_FIELDS:
            return sum(_engine_figure(vcpu.hart, name) for vcpu in vm.vcpus)
        if name in _EXITS:
            return sum(getattr(vcpu.stats, name) for vcpu in vm.vcpus)
        if name in _VM_FIGURES:
            return _VM_FIGURES[name](vm.machine) if vm.has_machine else 0
        return getattr(vm.stats, name)


def _engine_figure(hart: Hart, name: str) -> int:
    value = int(getattr(hart.state, _ENGINE_FIELDS[name]))
    # While a hart runs, its count is in a register; `limit` was SLICE ahead of it at the last poll.
    return max(value, int(hart.state.limit) - SLICE) if name == "guest_instructions" else value


def _hot(machine: Machine, name: str) -> int:
    return int(getattr(machine.hot_code, name)) if machine.hot_code is not None else 0


def _host(machine: Machine, name: str) -> int:
    return int(getattr(machine.hot_code.host, name)) if machine.hot_code is not None else 0


_VM_FIGURES: dict[str, Callable[[Machine], int]] = {
    "emulated_instructions": lambda machine: sum(hart.emulated for hart in machine.harts),
    "decoded_pages": lambda machine: sum(hart.state.count_page for hart in machine.harts),
    "decoded_pages_given_up": lambda machine: machine.pages_given_up,
    "decoded_bytes": lambda machine: int(machine.state.pool_used),
    "code_bytes": lambda machine: machine.code_bytes,
    "assembled_pages": lambda machine: machine.hot_code.cold.pages if machine.hot_code is not None else 0,
    "regions": lambda machine: _hot(machine, "regions"),
    "regions_ready_made": lambda machine: _hot(machine, "ready_made"),
    "regions_translated": lambda machine: _hot(machine, "translated"),
    "translation_ns": lambda machine: _hot(machine, "nanoseconds"),
    "host_regions_translated": lambda machine: _host(machine, "regions"),
    "host_translation_ns": lambda machine: _host(machine, "nanoseconds"),
    "host_regions_waiting": lambda machine: _host(machine, "waiting"),
    "host_arena_bytes": lambda machine: _host(machine, "arena"),
    "host_template_bytes": lambda machine: _host(machine, "templates"),
}


class StatsFile(StatsBase):
    """What KVM_GET_STATS_FD makes: a read-only file over the counters of a VM or vCPU."""

    def __init__(
        self, vm: Vm, label: str, statistics: tuple[Statistic, ...], counters: Any
    ) -> None:
        """`counters` has an attribute for each of `statistics`."""
        super().__init__(vm)
        self._statistics = statistics
        self._counters = counters
        self._label = label

    def read(self, offset: int, size: int) -> bytes:
        """pread(): short at the end of the file."""
        return self.contents()[offset : offset + size]

    def contents(self) -> bytes:
        """The whole file now."""
        values: list[int] = []
        for statistic in self._statistics:
            value = getattr(self._counters, statistic.name)
            values += [value] if statistic.size == 1 else value
        return _head(self._label, self._statistics) + struct.pack(f"<{len(values)}Q", *values)


@cache
def _head(label: str, statistics: tuple[Statistic, ...]) -> bytes:
    """Header, id string and descriptors."""
    id_offset = structs.STATS_HEADER.size
    desc_offset = id_offset + NAME_SIZE
    data_offset = desc_offset + len(statistics) * (structs.STATS_DESC.size + NAME_SIZE)
    parts = [
        structs.STATS_HEADER.build(
            flags=0,
            name_size=NAME_SIZE,
            num_desc=len(statistics),
            id_offset=id_offset,
            desc_offset=desc_offset,
            data_offset=data_offset,
        ),
        label.encode()[: NAME_SIZE - 1].ljust(NAME_SIZE, b"\0"),
    ]
    offset = 0
    for statistic in statistics:
        parts.append(
            structs.STATS_DESC.build(
                flags=statistic.flags,
                exponent=statistic.exponent & 0xFFFF,
                size=statistic.size,
                offset=offset,
                bucket_size=0,
            )
        )
        parts.append(statistic.name.encode().ljust(NAME_SIZE, b"\0"))
        offset += 8 * statistic.size
    return b"".join(parts)


def vm_stats_file(vm: Vm) -> StatsFile:
    """KVM_GET_STATS_FD on a VM."""
    if not vm.session.compat.extended:
        return StatsFile(vm, vm.label, VM_STATISTICS, vm.stats)
    return StatsFile(vm, vm.label, _EVERY_VM_STATISTIC, VmFigures(vm))


def vcpu_stats_file(vcpu: Vcpu) -> StatsFile:
    """KVM_GET_STATS_FD on a vCPU."""
    label, compat = f"{vcpu.vm.label}/vcpu-{vcpu.id}", vcpu.session.compat
    if compat.extended:
        return StatsFile(vcpu.vm, label, _EVERY_VCPU_STATISTIC, VcpuFigures(vcpu))
    return StatsFile(vcpu.vm, label, LINUX_6_12_VCPU_STATISTICS if compat.is_6_12 else VCPU_STATISTICS, vcpu.stats)
