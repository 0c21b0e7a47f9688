"""Memory of a VM that has yet to come, when its device process has died: what that has left (machine/keeper.py) says where the
pages are, and made_of() goes on from there. Of a snapshot the files themselves are left, open, whatever has become of their
folder since; of a post-copy the socket that the source calls.

What was left is checked like everything that comes from elsewhere: ValueError.
"""

from __future__ import annotations

import os

import msgspec

from protocol.channel import fd_passing
from qemu_user.migration import increments, steps
from qemu_user.migration.snapshot import CLUSTER, Clusters


class LeftFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """One of a snapshot and its parents; its descriptor comes along."""

    path: str
    size: int
    sums: bytes
    inherited: bytes


class LeftSnapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="snapshot"):
    """Its files, the parent behind the child."""

    files: list[LeftFile]


class LeftPostcopy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="post-copy"):
    """The source has them. Its descriptor, if it calls a Unix socket: the listening one."""

    uuid: str
    generation: int
    journal: str
    """The source's, if it is on this machine."""
    path: str
    """Where it calls."""
    listen: str = ""
    """tcp: the address instead, with the port."""
    public: str = ""
    """Our key."""
    peer: str = ""
    """And its own."""


Left = LeftSnapshot | LeftPostcopy


class SnapshotMemory:
    """A PageSource: the memory in a snapshot."""

    cluster = CLUSTER

    def __init__(self, clusters: Clusters) -> None:
        """`clusters` are ours from now on."""
        self._clusters = clusters

    def offsets(self) -> list[int]:
        """The clusters that are not zero."""
        return list(self._clusters.offsets())

    def read(self, offset: int, into: memoryview) -> None:
        steps.reached("restored:page", self.close)
        self._clusters.read(offset, into)

    def left(self) -> tuple[bytes, list[int]]:
        chain = self._clusters.chain()
        files = [LeftFile(str(one.path), one.size, bytes(one.sums), one.inherited) for one in chain]
        return encoded(LeftSnapshot(files)), [one.fd for one in chain]

    def close(self) -> None:
        steps.reached("restored:whole", lambda: None)
        self._clusters.close()


def encoded(left: Left) -> bytes:
    """For decoded()."""
    return msgspec.msgpack.encode(left)


def decoded(data: bytes) -> Left:
    """ValueError."""
    return msgspec.msgpack.decode(data, type=Left)


def snapshot_memory(left: LeftSnapshot, fds: list[int]) -> SnapshotMemory:
    """The descriptors are its own from now on. ValueError: they do not belong together; they are closed then."""
    try:
        _check(left.files, fds)
    except ValueError:
        fd_passing.close_all(fds)
        raise
    clusters: Clusters | None = None
    for file, fd in reversed(list(zip(left.files, fds, strict=True))):
        clusters = Clusters(file.path, file.size, file.sums, file.inherited, clusters, fd)
    assert clusters is not None
    return SnapshotMemory(clusters)


def _check(files: list[LeftFile], fds: list[int]) -> None:
    if len(files) != len(fds) or not files:
        raise ValueError("other files than were left")
    for number, (file, fd) in enumerate(zip(files, fds, strict=True), 1):
        size = file.size
        if size != files[0].size or os.fstat(fd).st_size != size or len(file.sums) != 4 * -(-size // CLUSTER):
            raise ValueError(f"{file.path}: of another size than was left")
        if len(file.inherited) != (0 if number == len(files) else increments.bitmap_size(size)):
            raise ValueError(f"{file.path}: a bitmap of another size than was left")
