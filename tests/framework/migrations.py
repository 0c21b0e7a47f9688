"""`scripts/migrations N`: a VM under load is moved N times back and forth between two hosts on this machine, in every way in
turn, and nothing may be lost. In the guest: a program that counts in every page of 64 MB and checks; files written to an ext4
and compared; a CPU busy with hashing; the clock sampled. Outside: a TCP connection from it to another VM on
the same wire stays open and its lines are counted, and in the end the file system is checked.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qemu_user.bench.hosts import command, wait_until_up
from qemu_user.bench.wire import Wire
from tests.migration.hosts import HostUnderTest

WAYS = (("--copy",), (), ("--postcopy",), ("--copy", "--max-downtime", "100ms"))
_PEER = "10.77.0.3"
_BLOCK = 4096
#: name, block of /dev/vda where it says how far it is, or BAD.
_REPORTS = {"memory": 1, "files": 2, "hashes": 3}


def _report(name: str, words: str) -> str:
    return f"printf '%-4096s' \"{words}\" | dd of=/dev/vda bs=4096 seek={_REPORTS[name]} conv=fsync 2>/dev/null"


def load() -> list[str]:
    """The guest's shell commands, each a job of its own."""
    files = f"""(mount -t ext4 /dev/vdb /mnt && n=0 && while :; do
 dd if=/dev/urandom of=/tmp/x bs=64k count=32 2>/dev/null; s=$(md5sum </tmp/x)
 cp /tmp/x /mnt/f$((n%8)); sync; echo 3 >/proc/sys/vm/drop_caches
 [ "$s" = "$(md5sum </mnt/f$((n%8)))" ] || {{ {_report("files", "BAD $n")}; sleep 100000; }}
 n=$((n+1)); {_report("files", "good $n")}
done)"""
    hashes = f"""(n=0; s=$(dd if=/dev/zero bs=1M count=4 2>/dev/null | sha256sum); while :; do
 [ "$s" = "$(dd if=/dev/zero bs=1M count=4 2>/dev/null | sha256sum)" ] || {{ {_report("hashes", "BAD $n")}; sleep 100000; }}
 n=$((n+1)); {_report("hashes", "good $n")}
done)"""
    memory = f"""(/tmp/probe check 64; {_report("memory", "BAD")})"""
    talk = f"""(i=0; while :; do i=$((i+1)); echo $i; usleep 2000; done | nc {_PEER} 7000)"""
    return [files, hashes, memory, talk]


LISTEN = f"""ip addr add {_PEER}/24 dev eth0; ip link set eth0 up; echo good 0 >/tmp/said
(while :; do dd if=/tmp/said of=/dev/vda bs=4096 conv=sync,fsync 2>/dev/null; usleep 300000; done) &
sleep 100000 | nc -l -p 7000 | awk '$1 != NR {{ print "BAD " NR >"/tmp/said"; close("/tmp/said"); exit }}
 NR % 20 == 0 {{ print "good " NR >"/tmp/said"; close("/tmp/said") }}'
echo BAD closed >/tmp/said; sleep 100000"""
"""What the VM at the other end of the connection runs: it counts lines, and says so on its disk."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/migrations", description="Many migrations in a row under load.")
    parser.add_argument("count", type=int, nargs="?", default=500)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="skm-"))
    disk, files = folder / "disk", folder / "files"
    disk.write_bytes(bytes(1 << 20))
    with files.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["/sbin/mkfs.ext4", "-q", files], check=True)
    wire = Wire(folder / "wire")
    hosts = HostUnderTest(folder, "a"), HostUnderTest(folder, "b")
    try:
        return _run(options, folder, wire, hosts)
    finally:
        for host in hosts:
            host.close()
        wire.close()
        shutil.rmtree(folder, ignore_errors=True)


def _run(
    options: argparse.Namespace, folder: Path, wire: Wire, hosts: tuple[HostUnderTest, HostUnderTest]
) -> int:
    disk, files = folder / "disk", folder / "files"
    uris = [host.serve() for host in hosts]
    words = ["run", "--name", "vm", "--memory", "256M", "--smp", "2", "--drive", f"file={disk},format=raw",
             "--drive", f"file={files},format=raw"]  # fmt: skip
    peer = folder / "peer"
    peer.write_bytes(bytes(1 << 20))
    other = _start(hosts[0], wire, ["run", "--name", "peer", "--memory", "128M", "--drive", f"file={peer},format=raw"], LISTEN)
    while not peer.read_bytes().startswith(b"good"):
        time.sleep(0.1)
    first = _start(hosts[0], wire, words, command(*load()))
    wait_until_up(disk, wire)
    downtimes: dict[str, list[float]] = {}
    began, at = time.monotonic(), 0
    for number in range(options.count):
        way = WAYS[number // 2 % len(WAYS)]
        hosts[at].wait_for_names(sorted(["vm", *(["peer"] if at == 0 else [])]), 300)
        before = _progress(folder)
        done = hosts[at].softkvm("migrate", "vm", uris[1 - at], *way, seconds=600)
        if done.returncode:
            print(f"move {number + 1} {' '.join(way)}: {done.stderr.decode(errors='replace')}", flush=True)
            print(*(host.words() for host in hosts), sep="\n", flush=True)
            return 1
        stood = float(done.stderr.decode().split("the guest stood ")[1].split()[0])
        downtimes.setdefault(" ".join(way) or "given", []).append(stood)
        at = 1 - at
        if number % 5 == 4 or number + 1 == options.count:
            _wait_for_progress(folder, before)
        if (number + 1) % 10 == 0:
            rate = (number + 1) / (time.monotonic() - began)
            print(f"{number + 1} moves, {rate:.2f} a second, {_progress(folder)}", flush=True)
    figures = {way: {"median ms": statistics.median(v), "worst ms": max(v), "moves": len(v)} for way, v in downtimes.items()}
    hosts[at].softkvm("pause", "vm")
    reports = _progress(folder)
    hosts[at].softkvm("kill", "vm")
    first.wait(60)
    other.kill()
    other.wait()
    checked = subprocess.run(["/sbin/e2fsck", "-p", files], capture_output=True, text=True, check=False)
    again = subprocess.run(["/sbin/e2fsck", "-fn", files], capture_output=True, text=True, check=False)
    clean = checked.returncode in (0, 1) and again.returncode == 0  # the journal is played back once, then nothing is wrong
    print(f"{options.count} moves, nothing lost: {reports}")
    print(f"file system: {'clean' if clean else checked.stdout + again.stdout}")
    for way, row in figures.items():
        print(f"{way}: {row}")
    if options.json:
        kept = {"moves": options.count, "downtime": figures, "clean": clean}
        Path(options.json).write_text(json.dumps(kept, indent=2) + "\n")
    return 0 if clean else 1


def _start(host: HostUnderTest, wire: Wire, words: list[str], script: str) -> subprocess.Popen[bytes]:
    net = ["--netdev", f"stream,id=n0,addr.type=unix,addr.path={wire.path}", "busybox", "--", "sh", "-c", script]
    nothing = subprocess.DEVNULL
    command = [sys.executable, "-P", "-m", "qemu_user.cli.main", *words, *net]
    return subprocess.Popen(command, env=host.environment, stdin=nothing, stdout=nothing, stderr=nothing)


def _progress(folder: Path) -> dict[str, int]:
    """How far each part is. RuntimeError when one has found something wrong."""
    data = (folder / "disk").read_bytes()
    data += (folder / "peer").read_bytes()[:_BLOCK]
    found = {"clock": int.from_bytes(data[:8], "little")}
    for name, block in {**_REPORTS, "lines": -1}.items():
        block %= len(data) // _BLOCK
        words = data[block * _BLOCK : (block + 1) * _BLOCK].split(b"\0")[0].split()
        if words[:1] == [b"BAD"]:
            raise RuntimeError(f"{name}: wrong after {words[1:]}")
        if name != "memory":
            found[name] = int(words[1]) if words else 0
    return found


def _wait_for_progress(folder: Path, before: dict[str, int], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not all(value > before[name] for name, value in _progress(folder).items()):
        if time.monotonic() > end:
            raise RuntimeError(f"stands: {_progress(folder)} after {before}")
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
