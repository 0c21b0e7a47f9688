"""The fuzzer's model of KVM's rules against what real kernels were recorded to answer, x86 6.18 and RISC-V 7.2.

oracle_x86.txt and oracle_riscv.json are the records; each check below is one of their lines, done to the model.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qemu_user.fuzz.executor import Outcome
from qemu_user.fuzz.model import RISCV, X86, Model
from qemu_user.fuzz.sequence import Op

HERE = Path(__file__).parent
K64 = 0x10000
BASE = {"slot": 0, "guest_phys_addr": 0, "memory_size": K64, "userspace_addr": {"map": 0}}
OTHER = {"slot": 1, "guest_phys_addr": 4 * K64, "memory_size": K64, "userspace_addr": {"map": K64}}


def region(**members: Any) -> Op:
    return Op("ioctl", ("vm", 0), "SET_USER_MEMORY_REGION", members={**BASE, **members})


def vm(name: str, arg: int = 0, **members: Any) -> Op:
    return Op("ioctl", ("vm", 0), name, arg=arg, members=members or None)


CHECKS: tuple[tuple[Op, str, str], ...] = (
    (Op("ioctl", name="GET_API_VERSION"), "GET_API_VERSION(0)", "GET_API_VERSION(0)"),
    (Op("ioctl", name="GET_API_VERSION", arg=1), "GET_API_VERSION(1)", "GET_API_VERSION(1)"),
    (Op("ioctl", name="CREATE_VCPU"), "sys:CREATE_VCPU on /dev/kvm", "sys: CREATE_VCPU"),
    (vm("RUN"), "vm:RUN on vm fd", "vm: KVM_RUN"),
    (region(), "SUMR ok", "SUMR ok"),
    (region(), "SUMR same again (no change)", "SUMR same again"),
    (region(memory_size=2 * K64), "SUMR same slot different size", "SUMR change size"),
    (region(userspace_addr={"map": K64}), "SUMR same slot different hva", "SUMR change hva"),
    (region(guest_phys_addr=K64), "SUMR move gpa same slot", "SUMR move gpa"),
    (region(), "SUMR move back", "SUMR move back"),
    (region(slot=1), "SUMR overlap other slot", "SUMR overlap"),
    (region(slot=2, guest_phys_addr=8 * K64, memory_size=0x1800), "SUMR size unaligned", "SUMR size unaligned"),
    (region(slot=2, guest_phys_addr=0x80800), "SUMR gpa unaligned", "SUMR gpa unaligned"),
    (region(slot=2, guest_phys_addr=8 * K64, userspace_addr={"map": 8}), "SUMR hva unaligned", "SUMR hva unaligned"),
    (region(slot=2, memory_size=0), "SUMR size 0 of nonexisting slot", "SUMR size0 absent"),
    (region(slot=2, guest_phys_addr=(1 << 64) - 4096), "SUMR gpa+size wraps", "SUMR wrap"),
    (region(slot=0xFFFF, guest_phys_addr=8 * K64), "SUMR slot 0xffff", "SUMR slot 32767"),
    (region(slot=65536, guest_phys_addr=8 * K64), "SUMR slot 65536 (as_id 1)", "SUMR slot 65536 (as 1)"),
    (region(**{**OTHER, "flags": 2}), "SUMR flags=READONLY", "SUMR flags READONLY"),
    (region(**OTHER), "SUMR READONLY->RW change", "SUMR READONLY->RW"),
    (region(**{**OTHER, "memory_size": 0}), "SUMR delete slot1", ""),
    (region(slot=3, flags=4, guest_phys_addr=8 * K64), "SUMR flags=GUEST_MEMFD(4) on v1", "SUMR flags GUEST_MEMFD v1"),
    (region(slot=3, flags=1 << 31, guest_phys_addr=8 * K64), "SUMR flags=0x80000000", ""),
    (region(slot=3, guest_phys_addr=1 << 45, memory_size=1 << 44), "SUMR huge size 2^44", ""),
    (Op("ioctl", ("vm", 0), "SET_USER_MEMORY_REGION"), "SUMR NULL ptr", ""),
    (vm("GET_DIRTY_LOG", slot=0, dirty_bitmap={"out": 8}), "GET_DIRTY_LOG slot w/o flag", ""),
    (vm("GET_DIRTY_LOG", slot=9, dirty_bitmap={"out": 8}), "GET_DIRTY_LOG missing slot", ""),
    (region(flags=1), "SUMR set LOG_DIRTY slot0", ""),
    (vm("GET_DIRTY_LOG", slot=0, dirty_bitmap={"out": 8}), "GET_DIRTY_LOG ok", ""),
    (vm("GET_DIRTY_LOG", slot=0, dirty_bitmap=0), "GET_DIRTY_LOG NULL bitmap", ""),
    (vm("GET_DIRTY_LOG", slot=0xFFFF, dirty_bitmap={"out": 8}), "GET_DIRTY_LOG slot 0xffff", ""),
    (vm("RESET_DIRTY_RINGS"), "RESET_DIRTY_RINGS w/o ring", "RESET_DIRTY_RINGS none"),
    (vm("IRQ_LINE", irq=1, level=1), "IRQ_LINE no irqchip", "IRQ_LINE no irqchip"),
    (vm("SIGNAL_MSI", data=1), "SIGNAL_MSI no irqchip", "SIGNAL_MSI no irqchip"),
    (vm("IOEVENTFD", len=3, addr=16), "IOEVENTFD len3", "IOEVENTFD len3"),
    (vm("IOEVENTFD", len=16, addr=16), "IOEVENTFD len 16", "IOEVENTFD len16"),
    (vm("IOEVENTFD", len=0, flags=1, addr=16), "IOEVENTFD datamatch+len0", "IOEVENTFD dm+len0"),
    (vm("IOEVENTFD", len=4, flags=0x100, addr=16), "IOEVENTFD flags 0x100", "IOEVENTFD flags 0x100"),
    (vm("IOEVENTFD", len=4, addr=(1 << 64) - 2), "IOEVENTFD wrap", "IOEVENTFD wrap"),
    (vm("REGISTER_COALESCED_MMIO", addr=0, size=8, pio=2), "COALESCED_MMIO pio=2", "COALESCED pio2"),
    (vm("CREATE_GUEST_MEMFD", size=0, flags=1), "CREATE_GUEST_MEMFD size 0", ""),
    (vm("CREATE_VCPU", 0), "CREATE_VCPU 0", "CREATE_VCPU 0"),
    (vm("CREATE_VCPU", 0), "CREATE_VCPU 0 again", "CREATE_VCPU 0 again"),
    (vm("CREATE_VCPU", 1 << 31), "CREATE_VCPU 2^31", "CREATE_VCPU 2^31"),
    (vm("CREATE_VCPU", 100000), "CREATE_VCPU 100000", "CREATE_VCPU 1024"),
    (Op("ioctl", ("vcpu", 0), "CREATE_VCPU", arg=1), "vcpu CREATE_VCPU", "vcpu CREATE_VCPU"),
    (Op("ioctl", ("vcpu", 0), "SET_MP_STATE", members={"mp_state": 9}), "SET_MP_STATE 99", "SET_MP_STATE 9"),
)  # fmt: skip


def errno_of(recorded: str) -> str:
    """The errno of a record, "" for success."""
    word = recorded.split(" ")[0]
    return word if re.fullmatch(r"E[A-Z0-9]+", word) else ""


def records() -> tuple[dict[str, str], dict[str, str]]:
    x86: dict[str, str] = {}
    for line in (HERE / "oracle_x86.txt").read_text().splitlines():
        label, _, result = line.rstrip().rpartition("  ")
        x86.setdefault(label.strip(), result.strip())
    return x86, json.loads((HERE / "oracle_riscv.json").read_text())["7.2.13"]


@pytest.mark.parametrize("arch", ["x86", "riscv"])
def test_the_model_says_what_kernels_answered(arch: str) -> None:
    x86, riscv = records()
    recorded, model = (x86, Model(X86)) if arch == "x86" else (riscv, Model(RISCV))
    compared = 0
    for op, *labels in CHECKS:
        label = labels[arch == "riscv"]
        expected = model.expect(op)
        if label:
            assert label in recorded, label
            if expected is not None:
                compared += 1
                assert expected == errno_of(recorded[label]), label
        model.learn(op, Outcome(-1, expected) if expected else Outcome())
    assert compared >= (44 if arch == "x86" else 30)
