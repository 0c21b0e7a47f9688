"""A guest with its own drivers and QEMU virt's addresses built in, no device tree: UART, PLIC, RTC, virtio
disk.

It runs with the options that one gives QEMU for such kernels, on our machine and on QEMU's.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.framework import guest_program, qemu_peer
from tests.framework.product import Product

CONTEXT = 1
"""QEMU's virt: hart 0 has the PLIC's contexts 0 (M-mode) and 1 (S-mode)."""
DISK = ["-global", "virtio-mmio.force-legacy=false", "-device", "virtio-blk-device,drive=x0,bus=virtio-mmio-bus.0"]


@pytest.fixture
def disk(tmp_path: Path) -> list[str]:
    """The guest's disk: 64 sectors, sector n filled with n."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(bytes([number]) * 512 for number in range(64)))
    return ["-drive", f"file={path},if=none,format=raw,id=x0", *DISK]


def run(command: list[str], product: Product | None = None) -> guest_program.GuestResult:
    """Runs it; what the guest said."""
    environment = product.environment if product else None
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, stdin=subprocess.DEVNULL, env=environment)
    return guest_program.read_result((done.stdout + done.stderr).decode(errors="replace"))


@pytest.mark.parametrize("machine", ["virt", "virt,aia=none"])
def test_on_our_machine(product: Product, disk: list[str], tmp_path: Path, machine: str) -> None:
    kernel = tmp_path / "guest"
    kernel.write_bytes(guest_program.build("machine", CONTEXT=CONTEXT, **guest_program.KVM))
    endpoint = product.daemon()
    command = [product.command()[0], "-P", "-m", "qemu_user", "-accel", f"kvmcore,endpoint={endpoint}", "-M", machine]
    result = run([*command, "-m", "128M", "-nographic", "-kernel", str(kernel), *disk], product)
    assert result.ok, result.output
    assert "text by the UART" in result.output


@pytest.mark.qemu
@pytest.mark.skipif(not qemu_peer.available(), reason="needs qemu-system-riscv64 (apt install qemu-system-misc)")
def test_on_qemu(disk: list[str], tmp_path: Path) -> None:
    kernel = tmp_path / "guest"
    kernel.write_bytes(guest_program.build("machine", CONTEXT=CONTEXT, **guest_program.OPENSBI))
    command = ["qemu-system-riscv64", "-M", "virt", "-m", "128M", "-nographic", "-monitor", "none"]
    result = run([*command, "-kernel", str(kernel), *disk])
    assert result.ok, result.output
