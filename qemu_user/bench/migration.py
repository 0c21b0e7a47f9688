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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.channel.shared_memory import create_memfd
from qemu_user.bench.debian_guest import Debian
from qemu_user.bench.hosts import QEMU, Host, Qemu, Ready, Row, Watch, busybox_words
from qemu_user.bench.wire import Wire
from qemu_user.images.store import Store
from qemu_user.migration import pages
from qemu_user.migration.channel import StreamChannel

_DIRTY = "/tmp/probe dirty 240 500"
"""0.5 GB/s."""
_PATIENCE = 12.0
_SETTLE = 0.5
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


class Place:
    """Two hosts, a wire between them, a folder that both see. A context manager."""

    def __enter__(self) -> Place:
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

    def there_and_back(self, name: str, **arguments: object) -> Row:
        """A move from one to two, watched, and one back."""
        with Watch(self.disk, self.wire) as watch:
            numbers = self.one.migrate(name, self._there, **arguments)
            self.two.wait_for(name)
        row = _row(numbers, watch)
        if arguments.get("postcopy"):
            arrived = self.two.arrived(name)["postcopy"]
            row |= {"fault us": arrived["median-us"], "faults": arrived["faults"]}
        self.two.migrate(name, self._back)
        self.one.wait_for(name)
        return row


def _row(numbers: Row, watch: Watch) -> Row:
    return {
        "downtime": max(watch.inside, watch.outside), "inside": watch.inside, "outside": watch.outside,
        "reported": numbers.get("downtime", -1), "total": numbers["total-time"], "rounds": numbers["ram"]["dirty-sync-count"],
        "converged": float(numbers["status"] == "completed"),
    }  # fmt: skip


_WAYS: dict[str, dict[str, object]] = {"copied": {"copy": True}, "memory given": {}, "post-copy": {"postcopy": True}}


def _idle(rounds: int, memory: int, put: Put) -> None:
    with Place() as place:
        place.one.boot("bench", memory, place.disk, place.wire)
        with _peer(place, memory) as qemu:
            _moves(place, rounds, put, "idle", _WAYS, qemu)
        put("snapshot", [place.one.snapshot("bench", f"s{number}") for number in range(rounds)])


def _debian(rounds: int, memory: int, put: Put) -> None:
    with Place() as place:
        place.one.boot_debian(Debian(place.folder), place.disk, place.wire)
        with _peer(place, memory, debian=True) as qemu:
            _moves(place, rounds, put, "idle Debian", _WAYS, qemu)


def _busy(rounds: int, memory: int, put: Put) -> None:
    with Place() as place:
        place.one.boot("bench", memory, place.disk, place.wire, _DIRTY, cpus=2)
        with _peer(place, memory, _DIRTY, cpus=2) as qemu:
            _moves(place, rounds, put, "0.5 GB/s dirtied", {way: _WAYS[way] for way in ("copied", "post-copy")}, qemu)


def _large(rounds: int, memory: int, put: Put) -> None:
    with Place() as place:
        fill = "dd if=/dev/zero of=/tmp/fill bs=1M count=3500 2>/dev/null"
        place.one.boot("bench", 4 << 30, place.disk, place.wire, fill)
        _moves(place, rounds, put, "4 GB", {"memory given": {}}, None)


class _Peer:
    """QEMU's VM with the same guest, which stands while it is not measured."""

    def __init__(self, words: list[str], folder: Path, disk: Path, wire: Wire, ready: Ready | None) -> None:
        self.qemu, self._disk, self._wire = Qemu(words, folder, disk, wire, ready), disk, wire
        self.qemu.pause()

    def move(self) -> Row:
        """Once, watched."""
        self.qemu.prepare()
        self.qemu.resume()
        with Watch(self._disk, self._wire, sampled=False) as watch:
            numbers = self.qemu.migrate(_PATIENCE)
        self.qemu.end_other()
        self.qemu.pause()
        return _row(numbers, watch)


@contextmanager
def _peer(place: Place, memory: int, *load: str, cpus: int = 1, debian: bool = False) -> Iterator[_Peer | None]:
    """None where there is no QEMU. Our VM stands while it boots."""
    if shutil.which(QEMU) is None:
        yield None
        return
    place.one.pause("bench")
    with tempfile.TemporaryDirectory(prefix="skb-") as text:
        folder = Path(text)
        wire, disk = Wire(folder / "wire"), folder / "disk"
        ready: Ready | None = None
        if debian:
            guest = Debian(folder)
            guest.new_probe_disk(disk)
            words, ready = guest.words(disk, wire), guest.log_in
        else:
            image = Store().ensure("busybox", lambda *_: None, extras=["ext4"])
            words = busybox_words(image, memory, folder, disk, wire, *load, cpus=cpus)
        peer = _Peer(words, folder, disk, wire, ready)
        with peer.qemu:
            place.one.resume("bench")
            yield peer
        wire.close()


def _moves(
    place: Place, rounds: int, put: Put, guest: str, ways: dict[str, dict[str, object]], peer: _Peer | None
) -> None:
    """Our ways and QEMU's, alternated."""
    values: dict[str, list[Row]] = {}
    for _ in range(rounds):
        for way, arguments in ways.items():
            values.setdefault(f"{guest}, {way}", []).append(place.there_and_back("bench", **arguments))
        if peer is not None:
            place.one.pause("bench")
            values.setdefault(f"{guest}, QEMU TCG", []).append(peer.move())
            place.one.resume("bench")
            time.sleep(_SETTLE)
    for name, rows in values.items():
        put(name, rows)


def _copies(rounds: int, memory: int, put: Put) -> None:
    with Place() as place:
        place.one.boot("bench", memory, place.disk, place.wire, idle=True)
        place.one.keep("bench", "s")
        put("restore", [place.one.restore("bench", "s") for _ in range(rounds)])
        put("20 clones", [place.one.clone("bench", 20)])


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
    "debian": _debian,
    "busy": _busy,
    "large": _large,
    "copies": _copies,
}
