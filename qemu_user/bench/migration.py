"""`softkvm bench migration`: migrations, snapshots and clones measured, beside QEMU where it has the feature and is installed.
Asserts nothing.

Downtime is what the guest sees of it: by a program inside that looks at its clock, and by a host on its network that calls
it every millisecond; what query-migrate says stands beside it. Both hosts are on this machine, and so is QEMU's other half.
"""

from __future__ import annotations

import mmap
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from protocol.channel.shared_memory import create_memfd
from qemu_user.bench.hosts import QEMU, Host, Qemu, Row, Watch
from qemu_user.bench.wire import Wire
from qemu_user.images.store import Store
from qemu_user.migration import pages
from qemu_user.migration.channel import StreamChannel

_DIRTY = "/tmp/probe dirty 240 500"
"""0.5 GB/s."""
_PATIENCE = 12.0
_SPAN = 256 << 20
_CHUNK = 1 << 20


def run(rounds: int, memory: int, only: str, tell: Callable[[str], None]) -> dict[str, Row]:
    """Name of a measurement -> its figures, in milliseconds where nothing else is said: medians, all values beside them."""
    results: dict[str, Row] = {}

    def put(name: str, values: list[Row]) -> None:
        results[name] = _figures(values)
        tell(f"{name}: {_text(results[name])}")

    for name, measure in _MEASUREMENTS.items():
        if only in ("", name):
            measure(rounds, memory, put)
    return results


Put = Callable[[str, list[Row]], None]


def _figures(values: list[Row]) -> Row:
    names = values[0].keys()
    return {name: round(statistics.median(value[name] for value in values), 2) for name in names} | {"runs": values}


def _text(row: Row) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in row.items() if name != "runs")


class _Place:
    """Two hosts, a wire between them, a folder that both see. A context manager."""

    def __enter__(self) -> _Place:
        self.folder = Path(tempfile.mkdtemp(prefix="skb-"))
        self.wire = Wire(self.folder / "wire")
        self.one, self.two = Host(), Host()
        self._there, self._back = self.two.serve(), self.one.serve()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for host in (self.one, self.two):
            host.__exit__()
        self.wire.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def disk(self) -> Path:
        return self.folder / "disk"

    def there_and_back(self, rounds: int, name: str, **arguments: object) -> list[Row]:
        """So many moves from one to two, watched, each with one back."""
        values = []
        for _ in range(rounds):
            with Watch(self.disk, self.wire) as watch:
                numbers = self.one.migrate(name, self._there, **arguments)
                self.two.wait_for(name)
            row = _row(numbers, watch)
            if arguments.get("postcopy"):
                arrived = self.two.arrived(name)["postcopy"]
                row |= {"fault us": arrived["median-us"], "faults": arrived["faults"]}
            values.append(row)
            self.two.migrate(name, self._back)
            self.one.wait_for(name)
        return values


def _row(numbers: Row, watch: Watch) -> Row:
    return {
        "downtime": max(watch.inside, watch.outside), "inside": watch.inside, "outside": watch.outside,
        "reported": numbers.get("downtime", -1), "total": numbers["total-time"], "rounds": numbers["ram"]["dirty-sync-count"],
        "converged": float(numbers["status"] == "completed"),
    }  # fmt: skip


def _idle(rounds: int, memory: int, put: Put) -> None:
    with _Place() as place:
        place.one.boot("bench", memory, place.disk, place.wire)
        put("idle, copied", place.there_and_back(rounds, "bench", copy=True))
        put("idle, memory given", place.there_and_back(rounds, "bench"))
        put("idle, post-copy", place.there_and_back(rounds, "bench", postcopy=True))
        put("snapshot", [place.one.snapshot("bench", f"s{number}") for number in range(rounds)])


def _busy(rounds: int, memory: int, put: Put) -> None:
    with _Place() as place:
        place.one.boot("bench", memory, place.disk, place.wire, _DIRTY, cpus=2)
        put("0.5 GB/s dirtied, copied", place.there_and_back(rounds, "bench", copy=True))
        put("0.5 GB/s dirtied, post-copy", place.there_and_back(rounds, "bench", postcopy=True))


def _large(rounds: int, memory: int, put: Put) -> None:
    with _Place() as place:
        fill = "dd if=/dev/zero of=/tmp/fill bs=1M count=3500 2>/dev/null"
        place.one.boot("bench", 4 << 30, place.disk, place.wire, fill)
        put("4 GB, memory given", place.there_and_back(rounds, "bench"))


def _copies(rounds: int, memory: int, put: Put) -> None:
    with _Place() as place:
        place.one.boot("bench", memory, place.disk, place.wire, idle=True)
        place.one.keep("bench", "s")
        put("restore", [place.one.restore("bench", "s") for _ in range(rounds)])
        put("20 clones", [place.one.clone("bench", 20)])


def _qemu_idle(rounds: int, memory: int, put: Put) -> None:
    _qemu(rounds, memory, put, "QEMU TCG: idle", 1)


def _qemu_busy(rounds: int, memory: int, put: Put) -> None:
    _qemu(1, memory, put, "QEMU TCG: 0.5 GB/s dirtied", 2, _DIRTY)


def _qemu(rounds: int, memory: int, put: Put, name: str, cpus: int, *load: str) -> None:
    if shutil.which(QEMU) is None:
        return
    image = Store().ensure("busybox", lambda *_: None, extras=["ext4"])
    values = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="skb-") as text:
            folder = Path(text)
            wire = Wire(folder / "wire")
            with Qemu(image, memory, folder, wire, *load, cpus=cpus) as qemu:
                with Watch(qemu.disk, wire) as watch:
                    numbers = qemu.migrate(_PATIENCE)
                values.append(_row(numbers, watch))
            wire.close()
    put(name, values)


# -- parts -------------------------------------------------------------------------------------------


def _throughput(rounds: int, memory: int, put: Put) -> None:
    """Pages through a channel from one process to another's memory, and looking for zeroes."""
    put("pages", [{"GB/s": _SPAN / 1e9 / _pages()} for _ in range(rounds)])
    area = mmap.mmap(-1, _SPAN)
    for at in range(0, _SPAN, 4096):
        area[at] = 0  # the pages are there
    address = pages.address_of(memoryview(area))
    values = []
    for _ in range(rounds):
        started = time.monotonic()
        assert list(pages.split_zeroes(address, 0, _SPAN // 4096, 4096)) == [(True, 0, _SPAN // 4096)]
        values.append({"GB/s": _SPAN / 1e9 / (time.monotonic() - started)})
    put("zero scan", values)


def _pages() -> float:
    """Seconds that it takes to send them all into memory that is there."""
    ours, theirs = socket.socketpair()
    memory = mmap.mmap(create_memfd("pages", _SPAN), _SPAN)
    for at in range(0, _SPAN, 4096):
        memory[at] = 1
    source = memoryview(bytes(range(256)) * (_CHUNK // 256))
    child = os.fork()
    if not child:
        theirs.close()
        channel = StreamChannel(ours)
        for at in range(0, _SPAN, _CHUNK):
            channel.send(1, at, payload=source)
        os._exit(0)
    ours.close()
    channel = StreamChannel(theirs)
    view = memoryview(memory)
    channel.receive(10)
    started = time.monotonic()
    channel.read_into(view[:_CHUNK])
    for at in range(_CHUNK, _SPAN, _CHUNK):
        channel.receive(10)
        channel.read_into(view[at : at + _CHUNK])
    spent = time.monotonic() - started
    os.waitpid(child, 0)
    channel.close()
    return spent


_MEASUREMENTS: dict[str, Callable[[int, int, Put], None]] = {
    "throughput": _throughput,
    "idle": _idle,
    "qemu-idle": _qemu_idle,
    "busy": _busy,
    "qemu-busy": _qemu_busy,
    "large": _large,
    "copies": _copies,
}
