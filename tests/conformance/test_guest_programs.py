"""The conformance guests pass on kvmcore, through the protocol; and under QEMU with OpenSBI, which tests
them.

Each guest is tests/guests/NAME.S; a failure prints the guest's own account.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.framework import guest_program, qemu_peer
from tests.framework.full_stack import Daemon, run_on_kvmcore

# name, harts, defines
RUNS: list[tuple[str, int, dict[str, int]]] = [
    ("sbi", 1, {}),
    ("sbi", 4, {}),
    ("traps", 2, {}),
    ("timer", 1, {"SSTC": 1}),
    ("timer", 1, {"SSTC": 0}),
    ("code", 1, {}),
    ("paged", 1, {"MODE": 8}),
    ("paged", 1, {"MODE": 9}),
    ("smp", 1, {"HARTS": 1}),
    ("smp", 2, {"HARTS": 2}),
    ("smp", 4, {"HARTS": 4}),
    ("smp", 8, {"HARTS": 8}),
    ("kernel", 1, {"HARTS": 1}),
    ("kernel", 4, {"HARTS": 4}),
]
NAMES = ["-".join([name, str(harts), *(f"{k}{v}" for k, v in d.items())]) for name, harts, d in RUNS]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as running:
        yield running


@pytest.mark.parametrize(("name", "harts", "defines"), RUNS, ids=NAMES)
def test_on_kvmcore(daemon: Daemon, name: str, harts: int, defines: dict[str, int]) -> None:
    image = guest_program.build(name, **guest_program.KVM, **defines)
    result = run_on_kvmcore(daemon.endpoint, image, harts, seconds=120)
    assert result.ok, result.output


@pytest.mark.qemu
@pytest.mark.skipif(not qemu_peer.available(), reason="needs qemu-system-riscv64 (apt install qemu-system-misc)")
@pytest.mark.parametrize(("name", "harts", "defines"), RUNS, ids=NAMES)
def test_in_qemu(name: str, harts: int, defines: dict[str, int]) -> None:
    image = guest_program.build(name, **guest_program.OPENSBI, **defines)
    result = guest_program.run_in_qemu(image, harts, seconds=120)
    assert result.ok, result.output
