"""The file of code that kvmcore gives to clients: what is mapped, and what is refused."""

from __future__ import annotations

import fcntl
import os

import pytest

from protocol.channel import vdso
from protocol.channel.vdso import SIZE, Vdso, code_file

THIRD = bytes.fromhex("4889d0c3")  # mov rax, rdx; ret


def test_the_code_runs_and_the_file_cannot_be_changed() -> None:
    fd = code_file(THIRD, 1000)
    try:
        mapped = Vdso(fd)
        assert mapped.run(1, 2, 3) == 3
        assert mapped.run(0, 0, (1 << 64) - 7) == -7  # an errno
        assert list(mapped.state())[1:] == [1000, 1000 * 20_000, 1, 0]
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"\xcc", vdso.CODE_AT)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)
    assert mapped.run(0, 0, 9) == 9  # the mapping is its own


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
