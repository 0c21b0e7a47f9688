"""Replaced files reach the disk before the VM runs, or it does not run."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_user.migration.written import Written


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    good = Written()
    good.add(str(tmp_path / "link"))
    good.start()
    good.wait()
    nothing = Written()
    nothing.start()
    nothing.wait()
    gone = Written()
    gone.add(str(tmp_path / "disk"))
    gone.add(str(tmp_path / "gone"))
    gone.start()
    with pytest.raises(OSError, match="gone"):
        gone.wait()
