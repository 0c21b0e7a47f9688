"""Every row of the ioctl table, every struct and every kvm_run offset equals the kernel's C headers.

Compiles _Static_asserts with whichever of gcc (host headers, generic parts) and riscv64-linux-gnu-gcc is
there. What an older header does not know yet is left out by #ifdef, or named in NEWER below for structs.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from protocol.abi import capabilities, exits, ioctls, run_page, structs, structs_riscv

CROSS = "riscv64-linux-gnu-gcc"
COMPILERS = [name for name in (CROSS, "gcc") if shutil.which(name)]
NEWER = {
    "kvm_userspace_memory_region2": "KVM_SET_USER_MEMORY_REGION2",
    "kvm_memory_attributes": "KVM_SET_MEMORY_ATTRIBUTES",
    "kvm_create_guest_memfd": "KVM_CREATE_GUEST_MEMFD",
    "kvm_pre_fault_memory": "KVM_PRE_FAULT_MEMORY",
}
ARCH_SPECIFIC = {"kvm_guest_debug"}
"""Structs with another size on x86."""


def compile_asserts(compiler: str, lines: list[str], tmp_path: Path) -> None:
    source = tmp_path / "asserts.c"
    source.write_text("#include <stddef.h>\n#include <linux/kvm.h>\n" + "\n".join(lines) + "\n")
    done = subprocess.run(
        [compiler, "-fsyntax-only", str(source)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def equal(expression: str, value: int, guard: str = "") -> str:
    condition = f"(unsigned long long)({expression}) == {value}ull"
    line = f'_Static_assert({condition}, "{expression} is {value:#x} here");'
    return f"#ifdef {guard}\n{line}\n#endif" if guard else line


@pytest.mark.parametrize("compiler", COMPILERS)
def test_request_numbers(compiler: str, tmp_path: Path) -> None:
    rows = [row for row in ioctls.IOCTLS if compiler == CROSS or row.name != "SET_GUEST_DEBUG"]
    compile_asserts(
        compiler, [equal(f"KVM_{row.name}", row.number, f"KVM_{row.name}") for row in rows], tmp_path
    )


@pytest.mark.parametrize("compiler", COMPILERS)
def test_struct_sizes_and_offsets(compiler: str, tmp_path: Path) -> None:
    lines: list[str] = []
    for layout in structs.LAYOUTS:
        if compiler != CROSS and layout.name in ARCH_SPECIFIC:
            continue
        guard = NEWER.get(layout.name, "")
        lines.append(equal(f"sizeof(struct {layout.name})", layout.size, guard))
        for field in layout.fields:
            if field.name.startswith("pad") or (layout.name, field.name) == (
                "kvm_coalesced_mmio_zone",
                "pio",
            ):
                continue
            member = {"kvm_create_device.flags": "flags"}.get(f"{layout.name}.{field.name}", field.name)
            lines.append(equal(f"offsetof(struct {layout.name}, {member})", field.offset, guard))
    compile_asserts(compiler, lines, tmp_path)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_kvm_run(compiler: str, tmp_path: Path) -> None:
    offsets = {
        "request_interrupt_window": run_page.REQUEST_INTERRUPT_WINDOW,
        "immediate_exit": run_page.IMMEDIATE_EXIT,
        "exit_reason": run_page.EXIT_REASON,
        "ready_for_interrupt_injection": run_page.READY_FOR_INTERRUPT_INJECTION,
        "if_flag": run_page.IF_FLAG,
        "flags": run_page.FLAGS,
        "cr8": run_page.CR8,
        "apic_base": run_page.APIC_BASE,
        "kvm_valid_regs": run_page.KVM_VALID_REGS,
        "kvm_dirty_regs": run_page.KVM_DIRTY_REGS,
        "s": run_page.SYNC_REGS,
        "mmio.phys_addr": run_page.MMIO_PHYS_ADDR,
        "mmio.data": run_page.MMIO_DATA,
        "mmio.len": run_page.MMIO_LEN,
        "mmio.is_write": run_page.MMIO_IS_WRITE,
        "riscv_sbi.extension_id": run_page.SBI_EXTENSION_ID,
        "riscv_sbi.function_id": run_page.SBI_FUNCTION_ID,
        "riscv_sbi.args": run_page.SBI_ARGS,
        "riscv_sbi.ret": run_page.SBI_RET,
        "riscv_csr.csr_num": run_page.CSR_NUM,
        "riscv_csr.new_value": run_page.CSR_NEW_VALUE,
        "riscv_csr.write_mask": run_page.CSR_WRITE_MASK,
        "riscv_csr.ret_value": run_page.CSR_RET_VALUE,
        "system_event.type": run_page.SYSTEM_EVENT_TYPE,
        "system_event.ndata": run_page.SYSTEM_EVENT_NDATA,
        "system_event.data": run_page.SYSTEM_EVENT_DATA,
        "fail_entry.hardware_entry_failure_reason": run_page.FAIL_ENTRY_REASON,
        "fail_entry.cpu": run_page.FAIL_ENTRY_CPU,
    }
    lines = [equal(f"offsetof(struct kvm_run, {member})", offset) for member, offset in offsets.items()]
    lines.append(equal("sizeof(struct kvm_run)", run_page.KVM_RUN_SIZE))
    lines.append(equal("offsetof(struct kvm_coalesced_mmio_ring, coalesced_mmio)", 8))
    if compiler == CROSS:
        lines.append(equal("KVM_COALESCED_MMIO_PAGE_OFFSET", capabilities.COALESCED_MMIO_PAGE))
    compile_asserts(compiler, lines, tmp_path)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_capabilities_exits_and_flags(compiler: str, tmp_path: Path) -> None:
    lines = [equal(f"KVM_CAP_{cap.name}", cap, f"KVM_CAP_{cap.name}") for cap in capabilities.Cap]
    lines += [equal(f"KVM_EXIT_{reason.name}", reason, f"KVM_EXIT_{reason.name}") for reason in exits.Exit]
    lines += [equal(f"KVM_SYSTEM_EVENT_{event.name}", event) for event in exits.SystemEvent]
    for name in ("MEM_LOG_DIRTY_PAGES", "MEM_READONLY", "MEM_GUEST_MEMFD", "GUEST_MEMFD_FLAG_MMAP",
                 "IRQFD_FLAG_DEASSIGN", "IRQFD_FLAG_RESAMPLE", "IRQ_ROUTING_IRQCHIP", "IRQ_ROUTING_MSI",
                 "MSI_VALID_DEVID", "CREATE_DEVICE_TEST", "GUESTDBG_ENABLE", "GUESTDBG_SINGLESTEP",
                 "MP_STATE_RUNNABLE", "MP_STATE_INIT_RECEIVED", "MP_STATE_STOPPED",
                 "API_VERSION"):  # fmt: skip
        ours = name.replace("IRQ_ROUTING_", "IRQ_ROUTING_TYPE_")
        lines.append(equal(f"KVM_{name}", getattr(structs, ours), f"KVM_{name}"))
    lines += [
        equal("KVM_IOEVENTFD_FLAG_DATAMATCH", structs.IOEVENTFD_FLAG_DATAMATCH),
        equal("KVM_IOEVENTFD_FLAG_PIO", structs.IOEVENTFD_FLAG_PIO),
        equal("KVM_IOEVENTFD_FLAG_DEASSIGN", structs.IOEVENTFD_FLAG_DEASSIGN),
        equal("KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY", structs.IOEVENTFD_FLAG_CCW_NOTIFY),
        equal("KVM_DIRTY_GFN_F_DIRTY", structs.DIRTY_GFN_DIRTY),
        equal("KVM_DIRTY_GFN_F_RESET", structs.DIRTY_GFN_RESET),
        equal("KVM_DIRTY_LOG_INITIALLY_SET", capabilities.INITIALLY_SET),
    ]
    compile_asserts(compiler, lines, tmp_path)


@pytest.mark.skipif(CROSS not in COMPILERS, reason="no RISC-V cross compiler")
def test_riscv_register_ids(tmp_path: Path) -> None:
    reg = "(KVM_REG_RISCV|KVM_REG_SIZE_U64|"
    lines = [
        equal(f"{reg}KVM_REG_RISCV_CONFIG|KVM_REG_RISCV_CONFIG_REG(isa))", structs_riscv.CONFIG_ID["isa"]),
        equal(f"{reg}KVM_REG_RISCV_TIMER|KVM_REG_RISCV_TIMER_REG(state))", structs_riscv.TIMER_ID["state"]),
        equal(f"{reg}KVM_REG_RISCV_CORE|KVM_REG_RISCV_CORE_REG(mode))", structs_riscv.CORE_ID["mode"]),
        equal(f"{reg}KVM_REG_RISCV_CORE|KVM_REG_RISCV_CORE_REG(regs.a0))", structs_riscv.CORE_ID["a0"]),
        equal(f"{reg}KVM_REG_RISCV_CORE|KVM_REG_RISCV_CORE_REG(regs.t6))", structs_riscv.CORE_ID["t6"]),
        equal(f"{reg}KVM_REG_RISCV_CSR|KVM_REG_RISCV_CSR_REG(satp))", structs_riscv.CSR_ID["satp"]),
        equal(f"{reg}KVM_REG_RISCV_FP_D|KVM_REG_RISCV_FP_D_REG(f[31]))", structs_riscv.FP_D_ID["f31"]),
    ]
    for extension in structs_riscv.IsaExt:
        # An enumerator, so no #ifdef: the cross header knows the ids up to this one.
        if extension <= structs_riscv.IsaExt.ZICBOM:
            lines.append(equal(f"KVM_RISCV_ISA_EXT_{extension.name}", extension))
    compile_asserts(CROSS, lines, tmp_path)


def test_every_row_is_consistent() -> None:
    for row in ioctls.IOCTLS:
        assert row.number >> 16 & 0x3FFF == row.argument_size
        assert row.tail or row.copies_in or row.copies_out or row.argument is None
        assert set(row.on) <= set(ioctls.KINDS)
        assert not row.capability or row.capability in capabilities.Cap.__members__
        assert ioctls.BY_NAME[row.name] is row
    assert len(ioctls.BY_REQUEST) == sum(len(row.on) for row in ioctls.IOCTLS)
