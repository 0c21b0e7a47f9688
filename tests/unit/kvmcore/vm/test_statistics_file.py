"""The binary statistics format (KVM_ABI 1.12), parsed as a client would."""

from __future__ import annotations

import struct
from types import SimpleNamespace

import pytest

from kvmcore.engine.hart_state import SLICE, HartState
from kvmcore.vm.statistics import (
    LINUX_6_12_VCPU_STATISTICS,
    VCPU_STATISTICS,
    VM_STATISTICS,
    StatsFile,
    VcpuStats,
    VmStats,
    vcpu_stats_file,
    vm_stats_file,
)
from protocol.abi import structs
from protocol.abi.compat import Compat


def parse(data: bytes) -> tuple[str, dict[str, list[int]], tuple[int, ...]]:
    header = structs.STATS_HEADER.parse(data)
    label = data[header.id_offset : header.id_offset + header.name_size].rstrip(b"\0").decode()
    values = {}
    for index in range(header.num_desc):
        at = header.desc_offset + index * (structs.STATS_DESC.size + header.name_size)
        desc = structs.STATS_DESC.parse(data[at:])
        name = data[at + structs.STATS_DESC.size : at + structs.STATS_DESC.size + header.name_size]
        values[name.rstrip(b"\0").decode()] = list(
            struct.unpack_from(f"<{desc.size}Q", data, header.data_offset + desc.offset)
        )
    return label, values, (header.num_desc, header.id_offset, header.desc_offset, header.data_offset)


def vcpu_stats() -> VcpuStats:
    return VcpuStats(SimpleNamespace(state=HartState()))


@pytest.mark.parametrize(
    ("statistics", "counters", "layout"),
    [
        (VM_STATISTICS, VmStats, (2, 24, 72, 200)),
        (VCPU_STATISTICS, vcpu_stats, (25, 24, 72, 1672)),
        (LINUX_6_12_VCPU_STATISTICS, vcpu_stats, (20, 24, 72, 1352)),
    ],
)
def test_layout(kernel, statistics, counters, layout):
    file = StatsFile(kernel.vm, "kvm-1/vcpu-0", statistics, counters())
    label, values, found = parse(file.contents())
    assert (label, found) == ("kvm-1/vcpu-0", layout)
    assert all(not any(value) for value in values.values())
    assert file.read(0, 10) == file.contents()[:10]
    assert file.read(1 << 20, 10) == b""


def test_counters_are_seen(kernel):
    stats = vcpu_stats()
    file = StatsFile(kernel.vm, "x", VCPU_STATISTICS, stats)
    stats.exits += 3
    stats.halted(1000)
    _, values, _ = parse(file.contents())
    assert values["exits"] == [3]
    assert values["halt_wait_ns"] == [1000]
    assert values["halt_wait_hist"][10] == 1
    assert sum(values["halt_wait_hist"]) == 1


def test_through_the_handle(kernel):
    number = kernel.call(kernel.vm, "GET_STATS_FD")
    label, values, _ = parse(kernel.session.table.handle(number).read(0, 4096))
    assert label == kernel.vm.label
    assert list(values)[:2] == ["remote_tlb_flush", "remote_tlb_flush_requests"], "Linux's come first"
    assert {"guest_instructions", "tlb_misses", "exits", "regions", "translation_ns", "host_arena_bytes"} < set(values)
    kernel.call(kernel.vm, "CREATE_VCPU", 0)
    hart = kernel.vm.vcpus[0].hart
    hart.state.icount, hart.state.limit = 5, 0
    kernel.vm.vcpus[0].stats.exits = 3
    _, values, _ = parse(kernel.session.table.handle(number).read(0, 8192))
    assert (values["guest_instructions"], values["exits"], values["regions"]) == ([5], [3], [0])
    hart.state.limit = SLICE + 7  # as while it runs
    number = kernel.call(kernel.vm.vcpus[0], "GET_STATS_FD")
    _, values, _ = parse(kernel.session.table.handle(number).read(0, 8192))
    assert (values["guest_instructions"], values["exits"]) == ([7], [3])


@pytest.mark.parametrize(("compat", "vm", "vcpu"), [(Compat.LINUX_7_2, 2, 25), (Compat.LINUX_6_12, 2, 20)])
def test_what_is_ours_is_hidden_with_linux_compat(kernel, compat, vm, vcpu):
    kernel.session.compat = compat
    kernel.call(kernel.vm, "CREATE_VCPU", 0)
    for handle, number in ((kernel.vm, vm), (kernel.vm.vcpus[0], vcpu)):
        file = vm_stats_file(handle) if handle is kernel.vm else vcpu_stats_file(handle)
        assert parse(file.contents())[2][0] == number
