"""The guest of `softkvm bench io` that times accesses to a device runs, here and under QEMU."""

from __future__ import annotations

import shutil

import pytest

from qemu_user.bench import exits


def test_here() -> None:
    assert exits.uart_read(exits.softkvm_command, accesses=200) > 0


@pytest.mark.qemu
def test_under_qemu() -> None:
    if shutil.which("qemu-system-riscv64") is None:
        pytest.skip("needs qemu-system-riscv64 (Debian: apt-get install qemu-system-misc)")
    assert exits.uart_read(exits.qemu_command, accesses=200) > 0
