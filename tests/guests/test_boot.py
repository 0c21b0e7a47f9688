"""Real guests boot: Debian's kernel with one, two and four CPUs, U-Boot, and both at once."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from qemu_user.machine.large_pages import LARGE, gather
from tests.framework.product import U_BOOT, Product, read_until

PROMPT = b"\n=> "
needs_u_boot = pytest.mark.skipif(not U_BOOT.exists(), reason=f"needs {U_BOOT} (apt install u-boot-qemu)")


@pytest.mark.net
@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_debian_boots(product: Product, busybox: None, cpus: int) -> None:
    script = "nproc; uname -sm; grep -c ^processor /proc/cpuinfo; cat /proc/interrupts >/dev/null; echo done"
    done = product.run("run", "--smp", str(cpus), "busybox", "--", "sh", "-c", script)
    assert done.stderr == b""
    assert done.stdout.decode().split("\n") == [str(cpus), "Linux riscv64", str(cpus), "done", ""]
    assert done.returncode == 0


@pytest.mark.net
def test_a_linux_fills_large_pages(product: Product, busybox: None) -> None:
    """Of the host, and the VM's process has them as such: most of what a boot writes to."""
    fd = os.memfd_create("probe")
    os.ftruncate(fd, LARGE)
    if not gather(fd, [range(LARGE)]):
        pytest.skip("needs a host with MADV_COLLAPSE (Linux 6.1)")
    os.close(fd)
    client = product.start("run", "--name", "large", "busybox", "--", "sh", "-c", "echo up; read line")
    read_until(client, b"up\n")
    (vm,) = product.named("kvmcore-vm large")
    lines = dict(line.split(":") for line in Path(f"/proc/{vm.pid}/smaps_rollup").read_text().splitlines()[1:])
    assert int(lines["ShmemPmdMapped"].split()[0]) >= 32 << 10, lines
    client.kill()


@pytest.mark.net
def test_all_cpus_work(product: Product, busybox: None) -> None:
    """Four CPUs compute the same sum at once, and the scheduler moves a hundred processes between them."""
    script = """
    sum() { i=0; s=0; while [ $i -lt 3000 ]; do s=$((s + i)); i=$((i + 1)); done; echo $s; }
    for n in 1 2 3 4 5 6 7 8; do sum & done; wait
    i=0; while [ $i -lt 100 ]; do (exit 3) & wait $! || c=$((c + 1)); i=$((i + 1)); done; echo $c
    """
    done = product.run("run", "--smp", "4", "busybox", "--", "sh", "-c", script)
    assert Counter(done.stdout.decode().split()) == {"4498500": 8, "100": 1}


@needs_u_boot
def test_u_boot(product: Product) -> None:
    """To its prompt, and a few commands."""
    process = product.start("run", "-m", "128M", "--kernel", str(U_BOOT))
    assert process.stdin is not None
    read_until(process, b"Hit any key")
    process.stdin.write(b"\n")
    process.stdin.flush()
    read_until(process, PROMPT)
    for command, answer in (
        ("version", b"U-Boot 20"),
        ("mw.l 84000000 600dcafe 4; md.l 84000000 4", b"84000000: 600dcafe 600dcafe 600dcafe 600dcafe"),
        ("setexpr x 0x1234 * 0x10; printenv x", b"x=12340"),
        ("fdt addr $fdtcontroladdr; fdt get value m / model; printenv m", b"\nm="),
        ("crc32 84000000 10", b"==> "),
        ("sleep 1; echo awake", b"\nawake"),
    ):
        process.stdin.write(command.encode() + b"\n")
        process.stdin.flush()
        assert answer in read_until(process, PROMPT)  # U-Boot throws away what is typed while it prints
    process.stdin.write(b"poweroff\n")
    process.stdin.flush()
    assert process.wait(60) == 0


@pytest.mark.net
@needs_u_boot
def test_two_operating_systems_at_once(product: Product, busybox: None) -> None:
    """Debian computes while U-Boot answers; each knows nothing of the other."""
    linux = product.start("run", "busybox", "--", "sh", "-c", "while read line; do echo linux $line; done")
    boot = product.start("run", "-m", "128M", "--kernel", str(U_BOOT))
    assert linux.stdin is not None
    assert boot.stdin is not None
    read_until(boot, b"Hit any key")
    boot.stdin.write(b"\n")
    boot.stdin.flush()
    read_until(boot, PROMPT)
    for number in range(5):
        linux.stdin.write(b"%d\n" % number)
        linux.stdin.flush()
        boot.stdin.write(b"echo u-boot %d\n" % number)
        boot.stdin.flush()
        read_until(linux, b"linux %d\n" % number)
        assert b"\nu-boot %d" % number in read_until(boot, PROMPT)
    assert len(product.named("kvmcore-vm")) == 2
    linux.stdin.close()
    assert linux.wait(60) == 0
    boot.stdin.write(b"echo still here\n")
    boot.stdin.flush()
    read_until(boot, b"\nstill here")


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cpus", [1, 2])
def test_a_hundred_boots_in_a_row(product: Product, busybox: None, cpus: int) -> None:
    """None hangs, none fails (with both parameters: 200)."""
    for number in range(100):
        done = product.run("run", "--smp", str(cpus), "busybox", "--", "echo", str(number), seconds=60)
        assert (done.returncode, done.stdout) == (0, f"{number}\n".encode()), (number, done.stderr)
    assert product.named("kvmcore-vm") == []
