"""Linux on two CPUs moved again and again while it writes and reads its disk: nothing is ever read that was not written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.migration.hosts import HostUnderTest

pytestmark = [pytest.mark.net, pytest.mark.slow]
MOVES = 12
#: Random data to the disk, read back past the page cache, compared; the verdict goes to the disk's last page.
SCRIPT = """n=0; while :; do
 dd if=/dev/urandom of=/tmp/x bs=64k count=64 2>/dev/null; s=$(md5sum </tmp/x)
 dd if=/tmp/x of=/dev/vda bs=64k seek=$((n%8*64)) conv=fsync 2>/dev/null; echo 3 >/proc/sys/vm/drop_caches
 r=$(dd if=/dev/vda bs=64k skip=$((n%8*64)) count=64 2>/dev/null | md5sum)
 n=$((n+1)); w=good; [ "$s" = "$r" ] || w=BAD
 printf '%-4096s' "$w $n" | dd of=/dev/vda bs=4096 seek=16383 conv=fsync 2>/dev/null
 [ $w = good ] || sleep 1000
done"""


class Load:
    """The VM "vm" on a host, under load."""

    def __init__(self, host: HostUnderTest, folder: Path, *options: str) -> None:
        self.disk = folder / "disk"
        self.disk.write_bytes(bytes(64 << 20))
        words = ["run", "--name", "vm", "--memory", "256M", "--smp", "2", "--drive", f"file={self.disk},format=raw"]
        command = [sys.executable, "-P", "-m", "qemu_user.cli.main", *words, *options, "busybox", "--", "sh", "-c", SCRIPT]
        nothing = subprocess.DEVNULL
        self.process = subprocess.Popen(command, env=host.environment, stdin=nothing, stdout=nothing, stderr=nothing)

    def rounds(self) -> int:
        """How many are done. AssertionError when one was wrong."""
        with self.disk.open("rb") as file:
            file.seek(-4096, 2)
            words = file.read().split()
        assert words[:1] != [b"BAD"], words
        return int(words[1]) if words[:1] == [b"good"] else 0

    def goes_on(self, seconds: float = 60) -> None:
        """Until one more round is done."""
        before, end = self.rounds(), time.monotonic() + seconds
        while self.rounds() <= before:
            assert time.monotonic() < end, f"stands after {before} rounds"
            time.sleep(0.05)


@pytest.mark.parametrize("words", [(), ("--copy",), ("--postcopy",)], ids=["handed", "copied", "postcopy"])
def test_moves_under_load(
    words: tuple[str, ...], hosts: tuple[HostUnderTest, HostUnderTest], tmp_path: Path, busybox: None
) -> None:
    one, two = hosts
    there, back = two.serve(), one.serve()
    load = Load(one, tmp_path)
    load.goes_on()
    source, target, uri, other = one, two, there, back
    for _ in range(MOVES):
        source.wait_for_names(["vm"])
        done = source.softkvm("migrate", "vm", uri, *words)
        assert done.returncode == 0, done.stderr.decode()
        load.goes_on()
        source, target, uri, other = target, source, other, uri
    load.process.wait(60)


KILLS = 40


def test_device_process_is_killed_under_load(hosts: tuple[HostUnderTest, HostUnderTest], tmp_path: Path, busybox: None) -> None:
    host, _ = hosts
    load = Load(host, tmp_path, "--keep")
    load.goes_on()
    pid = load.process.pid
    for number in range(KILLS):
        time.sleep(0.05 + 0.037 * (number % 11))  # in the middle of whatever it does
        os.kill(pid, signal.SIGKILL)
        if pid == load.process.pid:
            load.process.wait(60)
        done = host.softkvm("attach", "vm")
        assert done.returncode == 0, done.stderr.decode()
        (row,) = json.loads(host.softkvm("ps", "--format", "json").stdout)
        pid = row["pid"]
        if number % 4 == 3:
            load.goes_on()
    load.goes_on()
