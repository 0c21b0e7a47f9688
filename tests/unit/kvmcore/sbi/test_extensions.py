"""Every SBI extension against a written-down hart set: results, masks, unknown functions (KVM_ABI 2.1)."""

from __future__ import annotations

import pytest

from kvmcore import sbi
from kvmcore.sbi.extension import U64, After, Extension, Result, selected
from protocol.abi import structs_riscv as abi

HARTS = (0, 1, 5, 70)
EIDS = {"BASE": 0x10, "TIME": 0x54494D45, "IPI": 0x735049, "RFENCE": 0x52464E43, "HSM": 0x48534D,
        "SRST": 0x53525354, "DBCN": 0x4442434E, "EXPERIMENTAL": 0x08000000, "VENDOR": 0x09000000}  # fmt: skip


class Harts:
    """A Caller that writes down what it is asked to do."""

    hart_id = 0

    def __init__(self) -> None:
        self.done: list[tuple[object, ...]] = []
        self.stopped = {1}

    def spec_version(self) -> int:
        return 2 << 24

    def implementation_version(self) -> int:
        return 0x60C6B

    def machine_id(self, name: str) -> int:
        return {"mvendorid": 11, "marchid": 12, "mimpid": 13}[name]

    def probe(self, eid: int) -> int:
        return int(sbi.find(eid) is not None)

    def is_forwarded(self, eid: int) -> bool:
        return 0x08000000 <= eid <= 0x09FFFFFF

    def harts(self) -> tuple[int, ...]:
        return HARTS

    def set_timer(self, time: int) -> None:
        self.done.append(("timer", time))

    def send_ipi(self, hart: int) -> None:
        self.done.append(("ipi", hart))

    def fence_i(self, harts) -> None:
        self.done.append(("fence.i", *harts))

    def sfence_vma(self, harts, start: int, size: int, asid) -> None:
        self.done.append(("sfence", tuple(harts), start, size, asid))

    def is_memory(self, gpa: int) -> bool:
        return gpa >= 0x80000000

    def hart_status(self, hart: int) -> int:
        return int(hart in self.stopped)

    def hart_start(self, hart: int, pc: int, opaque: int) -> bool:
        if hart not in self.stopped:
            return False
        self.done.append(("start", hart, pc, opaque))
        return True

    def hart_stop(self) -> None:
        self.done.append(("stop",))


def call(name: str, function: int, *args: int, harts: Harts | None = None) -> Result:
    extension = sbi.find(EIDS[name])
    assert extension is not None
    return extension.call(harts or Harts(), function, [*args, *[0] * (6 - len(args))])


def test_the_list() -> None:
    assert {extension.name: extension.first for extension in sbi.EXTENSIONS} == EIDS
    for absent in (0, 1, 8, 0x504D55, 0x53555350, 0x535441, 0x46574654, 0x43505043, 0x4D505859, 0x0A000000):
        assert sbi.find(absent) is None
    found = sbi.find(0x09FFFFFF)
    assert found is not None
    assert found.name == "VENDOR"


@pytest.mark.parametrize("extension", sbi.EXTENSIONS, ids=lambda extension: extension.name)
def test_unknown_functions_are_not_supported(extension: Extension) -> None:
    harts = Harts()
    result = extension.call(harts, 99, [0] * 6)
    assert result.after is After.FORWARD or result == Result(abi.SBI_NOT_SUPPORTED)
    assert harts.done == []


def test_base() -> None:
    assert [call("BASE", function).value for function in (0, 1, 2, 4, 5, 6)] == [
        2 << 24,
        3,
        0x60C6B,
        11,
        12,
        13,
    ]
    assert call("BASE", 3, EIDS["HSM"]).value == 1
    assert call("BASE", 3, 0x504D55).value == 0
    assert call("BASE", 3, 0x09000001).after is After.FORWARD


@pytest.mark.parametrize(
    ("mask", "base", "chosen", "complete"),
    [
        (0b11, 0, [0, 1], True),
        (0b100011, 0, [0, 1, 5], True),
        (0b111, 0, [0, 1], False),
        (1, 70, [70], True),
        (1, 71, [], False),
        (0, 0, [], True),
        (0, U64, list(HARTS), True),
        (1 << 63, 0, [], False),
        (1, U64 - 1, [], False),
    ],
)
def test_hart_masks(mask: int, base: int, chosen: list[int], complete: bool) -> None:
    assert selected(Harts(), mask, base) == (chosen, complete)


def test_ipi_sends_to_the_valid_ones() -> None:
    harts = Harts()
    assert call("IPI", 0, 0b111, 0, harts=harts).error == abi.SBI_INVALID_PARAM
    assert harts.done == [("ipi", 0), ("ipi", 1)]


def test_rfence() -> None:
    harts = Harts()
    assert call("RFENCE", 0, 1, 0, harts=harts) == Result()
    assert call("RFENCE", 1, 3, 0, 0, 0, harts=harts) == Result()
    assert call("RFENCE", 2, 1, 1, 0x1000, 0x2000, 0x10007, harts=harts) == Result()
    assert harts.done == [
        ("fence.i", 0),
        ("sfence", (0, 1), 0, U64, None),
        ("sfence", (1,), 0x1000, 0x2000, 7),
    ]
    assert call("RFENCE", 3, 1, 0).error == abi.SBI_NOT_SUPPORTED


def test_hsm() -> None:
    harts = Harts()
    assert call("HSM", 0, 1, 0x80000000, 0x55, harts=harts) == Result()
    assert call("HSM", 0, 0, 0x80000000, harts=harts).error == abi.SBI_ALREADY_AVAILABLE
    assert call("HSM", 0, 9, 0x80000000, harts=harts).error == abi.SBI_INVALID_PARAM
    assert call("HSM", 0, 1, 0x1000, harts=harts).error == abi.SBI_INVALID_ADDRESS
    assert call("HSM", 1, harts=harts) == Result()
    assert harts.done == [("start", 1, 0x80000000, 0x55), ("stop",)]
    assert call("HSM", 2, 1, harts=harts).value == 1
    assert call("HSM", 2, 9, harts=harts).error == abi.SBI_INVALID_PARAM
    assert call("HSM", 3, 0, harts=harts).after is After.SLEEP
    assert call("HSM", 3, 0x80000000, harts=harts).error == abi.SBI_NOT_SUPPORTED
    assert call("HSM", 3, 1, harts=harts).error == abi.SBI_INVALID_PARAM


def test_srst() -> None:
    assert call("SRST", 0, 0, 1) == Result(0, 1, After.SHUTDOWN)
    assert call("SRST", 0, 1, 0).after is call("SRST", 0, 2).after is After.RESET
    assert call("SRST", 0, 3).error == abi.SBI_NOT_SUPPORTED


def test_timer_and_forwarded_calls() -> None:
    harts = Harts()
    assert call("TIME", 0, 12345, harts=harts) == Result()
    assert harts.done == [("timer", 12345)]
    for name in ("DBCN", "EXPERIMENTAL", "VENDOR"):
        assert call(name, 0, harts=harts).after is After.FORWARD
