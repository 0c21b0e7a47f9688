"""protocol/abi: layouts build and parse, requests are found by kind, capabilities by compat, errors print."""

from __future__ import annotations

import pickle
import struct
from errno import EINVAL

import pytest

from protocol.abi import capabilities, ioctls, run_page, structs, structs_riscv
from protocol.abi.capabilities import Cap
from protocol.abi.compat import Compat
from protocol.abi.errors import KvmError

SIZES = {
    "kvm_userspace_memory_region": 32, "kvm_userspace_memory_region2": 160, "kvm_dirty_log": 16,
    "kvm_clear_dirty_log": 24, "kvm_dirty_gfn": 16, "kvm_irq_level": 8, "kvm_irqfd": 32, "kvm_ioeventfd": 64,
    "kvm_msi": 32, "kvm_irq_routing": 8, "kvm_irq_routing_entry": 48, "kvm_create_device": 12,
    "kvm_device_attr": 24, "kvm_enable_cap": 104, "kvm_one_reg": 16, "kvm_coalesced_mmio_zone": 16,
    "kvm_coalesced_mmio": 24, "kvm_mp_state": 4, "kvm_interrupt": 4, "kvm_guest_debug": 8,
    "kvm_stats_header": 24, "kvm_stats_desc": 16, "kvm_memory_attributes": 32, "kvm_create_guest_memfd": 64,
    "kvm_pre_fault_memory": 64,
}  # fmt: skip


@pytest.mark.parametrize("layout", structs.LAYOUTS, ids=lambda layout: layout.name)
def test_layout_round_trip(layout: structs.Layout) -> None:
    assert layout.size == SIZES.get(layout.name, layout.size)
    data = bytes(range(1, layout.size + 1))
    parsed = layout.parse(data)
    assert layout.build(**{field.name: getattr(parsed, field.name) for field in layout.fields}) == data
    assert layout.build() == bytes(layout.size)


@pytest.mark.parametrize("layout", structs.LAYOUTS, ids=lambda layout: layout.name)
def test_construct_says_the_same(layout: structs.Layout) -> None:
    data = bytes(range(255, 255 - layout.size, -1))
    ours, theirs = layout.parse(data), layout.construct.parse(data)
    assert layout.construct.sizeof() == layout.size
    for field in layout.fields:
        value = getattr(ours, field.name)
        assert (list(value) if field.array else value) == getattr(theirs, field.name)
    assert layout.construct.build(theirs) == data
    assert layout.construct.build({}) == layout.build()


def test_build_refuses_what_is_not_there() -> None:
    with pytest.raises(TypeError, match="nonsense"):
        structs.ONE_REG.build(nonsense=1)
    for members in ({"args": [1, 2]}, {"args": [1, 2, 3, 1 << 64]}, {"pad": b"short"}, {"cap": -1}, {"cap": 1 << 32}):
        with pytest.raises((ValueError, struct.error)):
            structs.ENABLE_CAP.build(**members)
    with pytest.raises(struct.error):
        structs.ENABLE_CAP.parse(bytes(structs.ENABLE_CAP.size - 1))


def test_definitions_are_checked() -> None:
    with pytest.raises(ValueError, match="name:type"):
        structs.Layout("broken", "a:u32 b")


def test_two_requests_share_a_number_but_not_a_request() -> None:
    status, zone = ioctls.BY_NAME["IRQ_LINE_STATUS"], ioctls.BY_NAME["REGISTER_COALESCED_MMIO"]
    assert status.number & 0xFF == zone.number & 0xFF == 0x67
    assert ioctls.find("vm", 0xC008AE67) is status
    assert ioctls.find("vm", 0x4010AE67) is zone


def test_requests_belong_to_kinds() -> None:
    run = ioctls.BY_NAME["RUN"]
    assert ioctls.find("vcpu", run.number) is run
    assert ioctls.find("vm", run.number) is None
    assert ioctls.find("vm", 0x5401) is None
    assert {ioctls.find(kind, 0xAE03) for kind in ("system", "vm")} == {ioctls.BY_NAME["CHECK_EXTENSION"]}


@pytest.mark.parametrize("compat", Compat)
def test_capability_values(compat: Compat) -> None:
    assert capabilities.value(compat, Cap.NR_MEMSLOTS) == 32767
    assert capabilities.value(compat, 99999) == capabilities.value(compat, -1) == 0
    assert bool(capabilities.value(compat, Cap.GUEST_MEMFD)) == compat.extended
    assert capabilities.value(compat, Cap.MANUAL_DIRTY_LOG_PROTECT2) == (1 if compat.is_6_12 else 3)


def test_register_ids() -> None:
    assert structs_riscv.CONFIG_ID["isa"] == 0x8030000001000000
    assert structs_riscv.CORE_ID["pc"] == 0x8030000002000000
    assert structs_riscv.TIMER_ID["state"] == 0x8030000004000003
    assert structs_riscv.FP_D_ID["fcsr"] == 0x8020000006000020
    assert structs_riscv.one_reg_size(structs_riscv.FP_D_ID["fcsr"]) == 4
    assert structs_riscv.aia_imsic_attr(3, 0x70) == 0x3070


def test_run_page_fits() -> None:
    assert run_page.KVM_RUN_SIZE <= run_page.DOORBELL_BELL
    assert run_page.DOORBELL_KICK + 4 <= run_page.PAGE
    assert run_page.COALESCED_MAX == 170
    for packed in (run_page.MMIO, run_page.SBI, run_page.CSR, run_page.SYSTEM_EVENT):
        assert packed.size <= run_page.UNION_SIZE


def test_error_is_an_os_error() -> None:
    error = KvmError(EINVAL, "CREATE_VCPU", "vCPU ids are 0 to 1023")
    assert isinstance(error, OSError)
    assert error.errno == EINVAL
    assert str(error) == "CREATE_VCPU: EINVAL (vCPU ids are 0 to 1023)"
    again = pickle.loads(pickle.dumps(error))
    assert (again.errno, again.ioctl, again.reason) == (error.errno, error.ioctl, error.reason)
