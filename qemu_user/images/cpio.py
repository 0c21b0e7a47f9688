"""initramfs archives: cpio in the "newc" format (Linux, Documentation/driver-api/early-userspace/buffer-format.rst)."""

from __future__ import annotations

import stat


class Archive:
    """Collects entries; `finish()` gives the bytes. Several archives may stand one behind the other."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0
        self._folders: set[str] = set()

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """A regular file; its folders are made."""
        self._parents(name)
        self._entry(name, stat.S_IFREG | mode, content)

    def folder(self, name: str, mode: int = 0o755) -> None:
        self._parents(name)
        if name not in self._folders:
            self._folders.add(name)
            self._entry(name, stat.S_IFDIR | mode, b"")

    def symlink(self, name: str, target: str) -> None:
        self._parents(name)
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A character device."""
        self._parents(name)
        self._entry(name, stat.S_IFCHR | mode, b"", major, minor)

    def finish(self) -> bytes:
        """The archive, padded to 512 bytes."""
        self._entry("TRAILER!!!", 0, b"")
        data = b"".join(self._parts)
        return data + bytes(-len(data) % 512)

    def _parents(self, name: str) -> None:
        parent = name.rpartition("/")[0]
        if parent and parent not in self._folders:
            self.folder(parent)

    def _entry(self, name: str, mode: int, content: bytes, major: int = 0, minor: int = 0) -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(path), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + path
        self._parts += [head, bytes(-len(head) % 4), content, bytes(-len(content) % 4)]
