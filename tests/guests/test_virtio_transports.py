"""Debian's kernel on virtio over PCI and over virtio-mmio, with MSI-X and with INTx, on the whole stack."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qemu_user.images.store import Store
from tests.framework.product import ROOT, U_BOOT, Product, read_until

pytestmark = [pytest.mark.net, pytest.mark.timeout(240), pytest.mark.usefixtures("busybox")]

#: Writes to the disk and reads it back past the page cache; then says how many interrupts of which kind it took.
SCRIPT = """
dd if=/dev/urandom of=/tmp/x bs=64k count=16 2>/dev/null
dd if=/tmp/x of=/dev/vda bs=64k conv=fsync 2>/dev/null
echo 3 >/proc/sys/vm/drop_caches
dd if=/dev/vda bs=64k count=16 2>/dev/null | cmp - /tmp/x && echo SAME
grep virtio /proc/interrupts
echo DO''NE
"""


def _command(product: Product, disk: Path, *options: str) -> list[str]:
    image = Store().find("busybox")
    assert image is not None
    return [
        sys.executable, "-P", "-m", "qemu_user", "-accel", f"kvmcore,endpoint={product.daemon()}", "-m", "256M",
        "-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", image.append, "-serial", "none",
        "-chardev", "stdio,id=c", "-device", "virtconsole,chardev=c", "-drive", f"file={disk},if=none,id=d", *options,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (("-device", "virtio-blk-pci,drive=d,addr=7"), b"PCI-MSIX-0000:00:07.0"),
        (("-M", "virt,aia=none", "-device", "virtio-blk-pci,drive=d,addr=7"), b"SiFive PLIC"),
        (("-smp", "2", "-device", "virtio-blk-device,drive=d"), b"APLIC"),
    ],
    ids=["msix", "intx", "mmio"],
)
def test_disk_works_over_every_transport(product: Product, tmp_path: Path, options: tuple[str, ...], kind: bytes) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        _command(product, disk, *options), stdin=pipe, stdout=pipe, stderr=pipe, env=product.environment, cwd=ROOT
    )
    assert process.stdin is not None
    try:
        read_until(process, b"# ", 120)
        process.stdin.write(SCRIPT.encode())
        process.stdin.flush()
        said = read_until(process, b"DONE", 120)
    finally:
        process.kill()
        process.communicate()
    assert b"SAME" in said
    counts = [line.split()[1] for line in said.splitlines() if kind in line and b"config" not in line]
    assert any(int(count) for count in counts), said.decode(errors="replace")


@pytest.mark.skipif(not U_BOOT.exists(), reason="needs apt install u-boot-qemu")
def test_u_boot_finds_the_disk_on_pci(product: Product, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"\x78\x56\x34\x12" * 128 + bytes(1 << 20))
    running = product.start("run", "--kernel", str(U_BOOT), "--drive", f"file={disk}")
    assert running.stdin is not None
    try:
        read_until(running, b"autoboot", 120)
        running.stdin.write(b"\n")
        running.stdin.flush()
        read_until(running, b"=> ", 120)
        running.stdin.write(b"virtio scan; virtio read 0x82000000 0 1; md.l 0x82000000 1\n")
        running.stdin.flush()
        assert b"1 blocks read: OK" in (said := read_until(running, b"82000000: 12345678", 120)), said
    finally:
        running.kill()
        running.communicate()


def test_run_takes_devices_of_both_kinds(product: Product, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    script = "cd /sys/devices/platform/soc; ls -d 10004000.virtio_mmio/virtio*/block/vda 30000000.pci/*/0000:00:09.0/virtio*"
    done = product.run(
        "run", "--drive", f"file={disk},if=none,id=x", "--device", "virtio-blk-device,drive=x,bus=virtio-mmio-bus.3",
        "--device", "virtio-rng-pci,addr=9", "--", "sh", "-c", script,
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == 2, done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("options", [(), ("-M", "virt,aia=none")], ids=["msix", "intx"])
def test_a_killed_vm_process_is_told_in_one_sentence(product: Product, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Devices still work on what the guest has asked for when nobody takes their interrupts any more."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    pipe = subprocess.PIPE
    command = _command(product, disk, "-name", "victim", "-device", "virtio-blk-pci,drive=d", *options)
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=product.environment, cwd=ROOT)
    assert process.stdin is not None
    try:
        read_until(process, b"# ", 120)
        process.stdin.write(b"while :; do echo busy; done\n")
        process.stdin.flush()
        read_until(process, b"busy\r\nbusy\r\n", 120)
        (victim,) = product.named("kvmcore-vm victim")
        victim.kill()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 1
    assert b"is gone" in errors
    assert b"Traceback" not in errors
