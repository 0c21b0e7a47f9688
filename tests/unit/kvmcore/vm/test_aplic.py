"""The APLIC in MSI mode: registers, lines, level and edge sources, retriggering (AIA specification chapter
4).
"""

from __future__ import annotations

from errno import ENODEV, EOPNOTSUPP

import pytest

from kvmcore.vm.irqchip import aplic as regs
from kvmcore.vm.irqchip.aplic import Aplic
from protocol.abi.errors import KvmError


class Board:
    def __init__(self, sources=96, resampled=()):
        self.sent: list[tuple[int, int, int]] = []
        self.ended: list[int] = []
        self.aplic = Aplic(sources, lambda *msi: self.sent.append(msi), self.end)
        self.resampled = resampled

    def end(self, source):
        self.ended.append(source)
        return source in self.resampled

    def enable(self, source, mode, hart=0, eiid=7):
        self.aplic.write(regs.SOURCECFG + 4 * (source - 1), mode)
        self.aplic.write(regs.TARGET + 4 * (source - 1), hart << 18 | eiid)
        self.aplic.write(regs.SETIENUM, source)
        self.aplic.write(regs.DOMAINCFG, regs.DOMAINCFG_IE)


def test_domaincfg():
    board = Board()
    assert board.aplic.read(0) == 0x80000004
    board.aplic.write(0, 0xFFFFFFFF)
    assert board.aplic.read(0) == 0x80000104


@pytest.mark.parametrize(
    ("offset", "errno"), [(2, EOPNOTSUPP), (0x3FFC, ENODEV), (0x4000, ENODEV), (0x1C10, ENODEV)]
)
def test_places_without_a_register(offset, errno):
    for access in (lambda a: a.read(offset), lambda a: a.write(offset, 1)):
        with pytest.raises(KvmError) as refused:
            access(Board().aplic)
        assert refused.value.errno == errno


def test_edge():
    board = Board()
    board.enable(5, regs.EDGE_RISE, hart=1, eiid=33)
    board.aplic.set_line(5, True)
    board.aplic.set_line(5, True)
    assert board.sent == [(1, 0, 33)]
    board.aplic.set_line(5, False)
    board.aplic.set_line(5, True)
    assert len(board.sent) == 2


def test_falling_edge():
    board = Board()
    board.enable(5, regs.EDGE_FALL)
    board.aplic.set_line(5, True)
    assert board.sent == []
    board.aplic.set_line(5, False)
    assert board.sent == [(0, 0, 7)]


def test_level_is_sent_once_and_again_when_the_driver_ends_it():
    board = Board()
    board.enable(5, regs.LEVEL_HIGH)
    board.aplic.set_line(5, True)
    assert len(board.sent) == 1
    board.aplic.write(regs.SETIPNUM_LE, 5)
    assert len(board.sent) == 2
    assert board.ended == [5]
    board.aplic.set_line(5, False)
    board.aplic.write(regs.SETIPNUM_LE, 5)
    assert len(board.sent) == 2


def test_a_resampled_line_falls_when_the_driver_ends_it():
    board = Board(resampled=(5,))
    board.enable(5, regs.LEVEL_HIGH)
    board.aplic.set_line(5, True)
    board.aplic.write(regs.SETIPNUM_LE, 5)
    assert len(board.sent) == 1


def test_a_line_that_is_up_before_the_driver_comes():
    board = Board()
    board.aplic.set_line(5, True)
    board.enable(5, regs.LEVEL_HIGH)
    assert board.sent == [(0, 0, 7)]


def test_disabled_and_masked():
    board = Board()
    board.enable(40, regs.EDGE_RISE)
    board.aplic.write(regs.CLRIENUM, 40)
    board.aplic.set_line(40, True)
    assert board.sent == []
    assert board.aplic.read(regs.SETIP + 4) == 1 << 8
    assert board.aplic.read(regs.CLRIP + 4) == 1 << 8  # the rectified input
    board.aplic.write(regs.SETIE + 4, 1 << 8)
    assert len(board.sent) == 1
    assert board.aplic.read(regs.SETIP + 4) == 0


def test_inactive_sources_hold_nothing():
    board = Board()
    board.aplic.write(regs.SETIENUM, 3)
    board.aplic.write(regs.SETIPNUM, 3)
    assert board.aplic.read(regs.SETIE) == board.aplic.read(regs.SETIP) == 0
    with pytest.raises(KvmError) as refused:
        board.aplic.set_line(97, True)
    assert refused.value.errno == ENODEV
    with pytest.raises(KvmError):
        board.aplic.set_line(0, True)


def test_software_msi():
    board = Board()
    board.aplic.write(regs.GENMSI, 2 << 18 | 0x1F << 12 | 9)
    assert board.sent == [(2, 0, 9)]
    assert board.aplic.read(regs.GENMSI) == 2 << 18 | 9
