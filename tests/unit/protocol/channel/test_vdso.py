"""The file of code that kvmcore gives to clients: what is mapped, and what is refused."""

from __future__ import annotations

import fcntl
import os

import pytest

from protocol.channel import vdso
from protocol.channel.vdso import SIZE, Vdso, code_file

FIRST = bytes.fromhex("4889f8c3")  # mov rax, rdi; ret
THIRD = bytes.fromhex("488d4702c3")  # lea rax, [rdi + 2]; ret
SECOND = bytes.fromhex("488d4701c3")  # lea rax, [rdi + 1]; ret


def test_the_code_runs_and_the_file_cannot_be_changed() -> None:
    fd = code_file(FIRST, SECOND, THIRD, 1000)
    try:
        mapped = Vdso(fd)
        assert mapped.run(3) == 3
        assert mapped.run((1 << 64) - 7) == -7  # an errno
        assert (mapped.watch(3), mapped.drain(3)) == (4, 5)
        assert mapped.ticks_per_us == 1000 / vdso.SPIN_US
        assert list(mapped.state(0x1234))[1:] == [1000, 1000 * 20_000, 1, 0, 0x1234, 1]
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"\xcc", vdso.RUN_AT)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)
    assert mapped.run(9) == 9  # the mapping is its own


def test_code_that_is_too_long_is_refused() -> None:
    for run, watch, drain in ((bytes(2000), FIRST, FIRST), (FIRST, bytes(513), FIRST), (FIRST, FIRST, bytes(1537))):
        with pytest.raises(OSError, match="does not fit"):
            code_file(run, watch, drain, 1000)


def test_code_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vdso, "VERSION", vdso.VERSION + 1)
    fd = code_file(FIRST, SECOND, THIRD, 1000)
    monkeypatch.undo()
    with pytest.raises(OSError, match="version"):
        Vdso(fd)
    os.close(fd)


def test_what_others_could_change_is_not_executed() -> None:
    for seals in (0, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW):
        fd = os.memfd_create("open", os.MFD_ALLOW_SEALING)
        try:
            os.write(fd, bytes(SIZE))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            with pytest.raises(OSError, match="sealed"):
                Vdso(fd)
        finally:
            os.close(fd)
    read, write = os.pipe()
    with pytest.raises(OSError, match="Invalid argument"):
        Vdso(read)
    os.close(read)
    os.close(write)
