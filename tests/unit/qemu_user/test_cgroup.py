"""Limits of a VM: what the option says, a tree of files that stands for a host's, and this host's own where it lets us."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qemu_user import cgroup
from qemu_user.cgroup import CgroupError, Limits, VmCgroup, parse
from qemu_user.config.errors import ConfigError


def test_the_option() -> None:
    assert parse("memory=1G,cpus=1.5,pids=64") == Limits(1 << 30, 1.5, 64)
    assert parse("pids=50,parent=/a/b") == Limits(pids=50, parent="/a/b")
    wrong = ("", "memory", "memory=", "swap=1", "memory=x", "cpus=0", "pids=9", "pids=99,pids=98", "parent=/x", "cpu=1")
    for text in wrong:
        with pytest.raises(ConfigError, match="--cgroup"):
            parse(text)


def host(root: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, str]) -> None:
    """Group directories of plain files: mkdir makes none of a kernel's, which is enough to see what is written where."""
    monkeypatch.setattr(cgroup, "_own_groups", lambda: own)
    root.mkdir(exist_ok=True)


def test_version_1_has_a_group_in_each_hierarchy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host(tmp_path, monkeypatch, {"memory": "/user", "cpu": "/", "pids": "/"})
    for name in ("memory/user", "cpu", "pids"):
        (tmp_path / name).mkdir(parents=True)
    group = VmCgroup("web", Limits(1 << 20, 0.5, 9), tmp_path)
    folder = f"softkvm-web-{os.getpid()}"
    assert (tmp_path / "memory/user" / folder / "memory.limit_in_bytes").read_text() == str(1 << 20)
    assert (tmp_path / "cpu" / folder / "cpu.cfs_quota_us").read_text() == "50000"
    assert (tmp_path / "pids" / folder / "pids.max").read_text() == "9"
    assert (tmp_path / "pids" / folder / "cgroup.procs").read_text() == str(os.getpid())
    (tmp_path / "cpu" / folder / "cgroup.procs").write_text("")
    group.add(7)
    assert (tmp_path / "cpu" / folder / "cgroup.procs").read_text() == "7"


def test_version_2_enables_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host(tmp_path, monkeypatch, {"": "/mine"})
    parent = tmp_path / "mine"
    parent.mkdir()
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids")
    (parent / "cgroup.controllers").write_text("cpu memory")
    (parent / "cgroup.subtree_control").write_text("memory")
    VmCgroup("web", Limits(memory=1 << 30, cpus=2), tmp_path)
    folder = parent / f"softkvm-web-{os.getpid()}"
    assert (parent / "cgroup.subtree_control").read_text() == "+cpu"
    assert (folder / "cpu.max").read_text() == "200000 100000"
    assert (folder / "memory.max").read_text() == str(1 << 30)
    with pytest.raises(CgroupError, match="no pids controller"):
        VmCgroup("web", Limits(pids=3), tmp_path)


def test_what_the_host_does_not_have_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host(tmp_path, monkeypatch, {})
    with pytest.raises(CgroupError, match="no memory controller"):
        VmCgroup("web", Limits(memory=1 << 20), tmp_path)
    with pytest.raises(CgroupError, match="no control group"):
        VmCgroup("web", Limits(memory=1 << 20, parent=str(tmp_path)), tmp_path)
    (tmp_path / "pids").write_text("")
    with pytest.raises(CgroupError, match="no pids controller"):
        VmCgroup("web", Limits(pids=1), tmp_path)


def test_groups_of_the_dead_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host(tmp_path, monkeypatch, {"pids": "/"})
    (tmp_path / "pids" / "softkvm-old-4194305").mkdir(parents=True)
    (tmp_path / "pids" / "softkvm-alive-1").mkdir()
    VmCgroup("web", Limits(pids=9), tmp_path)
    assert not (tmp_path / "pids" / "softkvm-old-4194305").exists()
    assert (tmp_path / "pids" / "softkvm-alive-1").exists()


def test_on_this_host() -> None:
    pid = os.fork()
    if pid == 0:  # in a process of its own: it moves
        try:
            group = VmCgroup("test", Limits(pids=1000))
            inside = Path("/proc/self/cgroup").read_text()
            group.remove()
            outside = Path("/proc/self/cgroup").read_text()
            os._exit(0 if "softkvm-test" in inside and "softkvm-test" not in outside else 1)
        except CgroupError:
            os._exit(77)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 77:
        pytest.skip("this host's control groups cannot be written to")
    assert status == 0


@pytest.mark.parametrize("ends", ["os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_a_group_that_we_may_not_remove_goes_with_us(ends: str) -> None:
    """As with --only-files: the keeper is not in the group, sees our end, and removes it once nobody is inside."""
    code = f"""if True:
        import os, sys
        from qemu_user.cgroup import CgroupError, Limits, VmCgroup
        try:
            group = VmCgroup("kept", Limits(pids=1000), kept=True)
        except CgroupError:
            sys.exit(77)
        group.remove()
        print(*group._folders, sep="\\n", flush=True)
        sys.stdin.read(1)
        {ends}
    """
    command = [sys.executable, "-P", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        if process.poll() == 77 or folder == Path():
            pytest.skip("this host's control groups cannot be written to")
        assert (folder / "cgroup.procs").read_text().split() == [str(process.pid)]
        process.stdin.close()
        process.wait()
    until = time.monotonic() + 60
    while folder.exists():
        assert time.monotonic() < until, "nobody removes the group"
        time.sleep(0.02)


def test_what_is_lacking_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host(tmp_path, monkeypatch, {"": "/mine"})
    assert "memory" in cgroup.lacking(tmp_path)
    for name in ("memory", "cpu", "pids"):
        (tmp_path / name).mkdir()
    assert cgroup.lacking(tmp_path) == ""
    (tmp_path / "cgroup.controllers").write_text("memory cpu pids")
    assert "offers no memory, cpu, pids" in cgroup.lacking(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cgroup.controllers").write_text("memory cpu pids")
    assert cgroup.lacking(tmp_path) == ""
