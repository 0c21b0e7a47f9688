"""UEFI firmware from the flash: the shell, variables that stay, Linux from a disk by its EFI stub."""

from __future__ import annotations

import json
import time

import pytest

from qemu_user.images.store import Store
from tests.framework.fat import write_fat16
from tests.framework.product import Product, have_image, on_console, read_until

pytestmark = [pytest.mark.slow, pytest.mark.net, pytest.mark.timeout(900), pytest.mark.usefixtures("busybox", "edk2")]


@pytest.fixture(scope="module")
def edk2() -> None:
    if not have_image("edk2"):
        with Product() as fetching:
            done = fetching.run("pull", "edk2", seconds=300)
        assert done.returncode == 0, done.stderr.decode(errors="replace")


def test_variables_stay(product: Product) -> None:
    product.environment["XDG_DATA_HOME"] = str(product.runtime / "data")
    shell = product.start("run", "edk2", "--name", "firmware")
    assert shell.stdin is not None
    read_until(shell, b"UEFI Interactive Shell", 300)
    shell.stdin.write(b" ")
    shell.stdin.flush()
    read_until(shell, b"Shell>", 120)
    shell.stdin.write(b"setvar kept -guid 12345678-1234-1234-1234-123456789abc -bs -nv =0102\r\n")
    shell.stdin.flush()
    read_until(shell, b"Shell>", 120)
    shell.stdin.write(b"reset -s\r\n")
    shell.stdin.flush()
    shell.communicate(timeout=60)
    assert shell.returncode == 0
    variables = (product.runtime / "data/softkvm/vms/firmware/vars.fd").read_bytes()
    assert "kept".encode("utf-16-le") in variables
    assert b"edk2" in product.run("disks").stdout


def test_the_shell_goes_on_after_a_restore_and_an_upgrade(product: Product) -> None:
    """Firmware runs from the flash and writes to it: before a snapshot, in what is restored from it, and in new processes."""
    product.environment["XDG_DATA_HOME"] = str(product.runtime / "data")
    done = product.run("run", "edk2", "-d", "--name", "firmware", seconds=120)
    assert done.returncode == 0, done.stderr.decode()
    end = time.monotonic() + 300
    while b"UEFI Interactive Shell" not in product.run("console", "--log", "firmware").stdout:
        assert time.monotonic() < end
        time.sleep(1)

    def processes() -> list[int]:
        return [row["pid"] for row in json.loads(product.run("ps", "--format", "json").stdout) if row["name"] == "firmware"]

    def say(line: bytes, answer: bytes) -> None:
        on_console(product, "firmware", line + b"\r\n", answer)

    variables = b"-guid 12345678-1234-1234-1234-123456789abc"

    def store(name: bytes) -> None:
        """Until it is listed: keys that still wait when the VM is snapshotted or handed over are lost."""
        say(b"setvar %s %s -bs -nv =0102\r\ndmpstore %s" % (name, variables, variables), b"\x1b[40m%s\x1b[0m" % name)

    say(b"", b"Shell>")
    store(b"early")
    for words in (("snapshot", "firmware", "one"), ("restore", "firmware", "one")):
        assert (done := product.run(*words, seconds=120)).returncode == 0, done.stderr.decode()
    store(b"later")
    (before,) = processes()
    assert (done := product.run("upgrade", "firmware", seconds=120)).returncode == 0, done.stderr.decode()
    while processes() in ([before], []):  # the old one stays a moment, to be asked how it went
        assert time.monotonic() < end
        time.sleep(0.1)
    store(b"last")
    assert product.run("kill", "firmware").returncode == 0
    kept = (product.runtime / "data/softkvm/vms/firmware/vars.fd").read_bytes()
    assert all(name.encode("utf-16-le") in kept for name in ("early", "later", "last"))


def test_linux_is_booted_from_a_disk(product: Product) -> None:
    image = Store().find("busybox")
    assert image is not None
    disk = product.runtime / "esp.img"
    files = {
        "LINUX": image.kernel.read_bytes(), "INITRD": image.initrd.read_bytes(),
        "STARTUP.NSH": b"fs0:\r\n\\LINUX initrd=\\INITRD console=ttyS0\r\n",
    }  # fmt: skip
    write_fat16(disk, files)
    guest = product.start("run", "edk2", "-m", "1G", "--drive", f"file={disk},format=raw")
    said = read_until(guest, b"reboot: Power down", 600)
    assert b"efi: EFI v2.7" in said
    assert b"Linux version" in said
    guest.communicate(timeout=60)
    assert guest.returncode == 0
