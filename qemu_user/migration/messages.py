"""What the two ends of a migration say to each other. Kinds of frames, the records in them; no I/O.

    source                                  destination
    HELLO (who, what, a trial state)   ->
                                       <-   ACCEPT, or REJECT with the reason
    DATA, RUNS, ZEROES ...  ROUND      ->                                        pre-copy: any number of rounds
                                       <-   ROUND
    (stands) DATA ... STATE            ->   takes disks and state, does not run
                                       <-   PREPARED, or REJECT with the reason
    (journal: committed) COMMIT        ->   (journal: running) runs
                                       <-   RUNNING
    (ends)

    ABORT, from the source at any time before COMMIT: the destination forgets everything.

Post-copy: ABSENT before STATE names the memory that stays behind. From then on the destination may FETCH a piece of it,
answered by PAGE, one at a time; DONE, from the destination after RUNNING, means that it has them all. When the connection
is lost meanwhile the source calls again and says RESUME, the destination RESUMED (recovery.py).

Several channels: DATA, PACKED, DELTA, RUNS and ZEROES of memory may go over any of them, ROUND goes over each; after the last
round DONE, from the source, ends those beside the first one, which has everything else.

Until its journal says "committed" the VM is the source's, afterwards the destination's; see journal.py for what a
side does that hears nothing more. Sizes and units are checked by the receiver against its own machine.
"""

from __future__ import annotations

from array import array

import msgspec

PROTOCOL = 2
HELLO, ACCEPT, REJECT = 1, 2, 3
DATA, PACKED, ZEROES, ROUND = 4, 5, 6, 7
STATE, PREPARED, COMMIT, RUNNING, ABORT = 8, 9, 10, 11, 12
ABSENT, FETCH, PAGE, DONE = 13, 14, 15, 16
RESUME, RESUMED, DELTA, HOT, RUNS = 17, 18, 19, 20, 21
"""DATA: a = volume << 56 | first unit, b = units, payload: their bytes. PACKED: the same, zstd. DELTA: the same, of memory, as
exclusive or with what was sent before. ZEROES: without payload. ROUND: a = number. COMMIT, RUNNING: a = generation. ABSENT:
payload: a byte per PIECE of memory, 1: it stays behind. FETCH, PAGE: a = offset in memory, a multiple of PIECE; PAGE's payload
are its bytes. RUNS: a = how many runs of memory, payload: (u32 first page, u32 pages) of each, then their bytes. RESUME,
RESUMED: a = generation; RESUME's payload is the VM's uuid. HOT, once, right behind ACCEPT: what kvmcore says of hot code
(Vm.hot_here)."""
MOST_RUNS = 1024
"""In one RUNS."""
PIECE = 32 << 10
"""Bytes of memory that post-copy moves at once: 8 pages, a byte of the userfault bitmap."""
_VOLUME_SHIFT = 56


def place(volume: int, first: int) -> int:
    """The `a` of DATA and ZEROES."""
    return volume << _VOLUME_SHIFT | first


def placed(a: int) -> tuple[int, int]:
    """(volume, first unit) of it."""
    return a >> _VOLUME_SHIFT, a & (1 << _VOLUME_SHIFT) - 1


def runs_header(runs: list[tuple[int, int]]) -> bytes:
    """What stands before the bytes in RUNS: (first page, pages) of each."""
    return array("I", [word for run in runs for word in run]).tobytes()


def runs_of(header: bytes) -> list[tuple[int, int]]:
    """The runs of it."""
    words = array("I", header)
    return list(zip(words[::2], words[1::2], strict=True))


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Base of what HELLO and ACCEPT carry, as msgpack."""


class Hello(Record, frozen=True, kw_only=True):
    """What is to come. `state`: a container (sections.py) captured at this moment, so that whatever does not fit is found
    before anything is moved."""

    protocol: int
    name: str
    generation: int
    state: bytes
    features: list[str]
    """What the source can do beside the rules above: "zstd", "delta", "hot"; "memory-fd": the guest's memory itself comes with
    this message, as a descriptor, and is not to be touched before COMMIT; "postcopy": the VM runs before all of its memory has
    come."""
    disks: dict[int, int]
    """Disks, and files of the flash's banks, that travel along: volume number -> bytes. What a bank holds comes in any case."""
    running: bool
    host: str
    """boot id of the source's machine: journals of one machine can be looked at by both."""
    journal: str
    """Path of the source's journal there."""
    channels: int = 0
    """Connections beside this one that memory is to go over: on one machine they come with this message, behind the memory."""


class Accept(Record, frozen=True, kw_only=True):
    """`features`: those of the source's that will be used."""

    features: list[str]
    journal: str
    recover: str = ""
    """Post-copy over a Unix socket: where the source is to call when the connection is lost."""
    ports: list[int] = []
    """Over tcp: where the source is to call for the other connections."""


def encode(record: Record) -> bytes:
    """A record's bytes."""
    return msgspec.msgpack.encode(record)


def boot_id() -> str:
    """Which machine, since when."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
