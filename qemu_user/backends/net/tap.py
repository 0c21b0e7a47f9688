"""`-netdev tap`: an existing or new TAP interface of the host (needs CAP_NET_ADMIN, or an interface that is
ours).

One ioctl and a descriptor; bridges and addresses are the administrator's. Frames are whole reads and writes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from qemu_user.backends.errors import BackendBusy, BackendError
from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.net.backend import MAX_FRAME, NetBackend

_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x400454D0, 0x400454D8
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
HEADER_SIZE = 12
_OFFLOADS = {1 << 1: 0x01, 1 << 7: 0x02, 1 << 8: 0x04, 1 << 9: 0x08}
"""virtio-net's GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN as TUN_F_CSUM, TSO4, TSO6, TSO_ECN."""
_FRAMES_PER_TURN = 64


def open_tap(ifname: str, what: str) -> int:
    """A descriptor of the interface, made if it is not there (and we may); frames carry virtio-net headers. BackendError."""
    if not 0 < len(ifname.encode()) < 16 or "/" in ifname:
        raise BackendError(f"{what}: ifname={ifname} is not an interface name")
    fd = -1
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", ifname.encode(), flags))
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", HEADER_SIZE))
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        kind = BackendBusy if error.errno == errno.EBUSY else BackendError
        raise kind(
            f"{what}: tap interface {ifname}: {error.strerror} (make it with "
            f"'ip tuntap add {ifname} mode tap user $USER' as root, or use -netdev user)"
        ) from error
    return fd


def set_offloads(fd: int, features: int) -> None:
    """Which of virtio-net's GUEST_* features frames from the interface may use."""
    fcntl.ioctl(fd, _TUNSETOFFLOAD, sum(flag for feature, flag in _OFFLOADS.items() if features & feature))


class TapNet(NetBackend):
    """The interface `ifname`; the host's kernel does checksums and segmentation."""

    virtio_header = True

    def __init__(self, name: str, ifname: str, vhost: bool = False) -> None:
        super().__init__(name)
        self._ifname, self._vhost = ifname, vhost
        self._fd = -1
        self._loop: IoLoop | None = None
        self._buffer = memoryview(bytearray(HEADER_SIZE + MAX_FRAME))
        self._held = 0
        self._reading = False
        self._refused = False

    def start(self, loop: IoLoop) -> None:
        self._loop = loop
        if self._vhost:
            self.warn(f"netdev {self.name}: vhost=on is ignored: packets are moved by the device process here")
        self._fd = open_tap(self._ifname, f"netdev {self.name}")
        self.is_up = True
        self._listen()

    def _listen(self) -> None:
        if not self._reading and self._fd >= 0 and self._loop is not None:
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def _readable(self) -> None:
        for _ in range(_FRAMES_PER_TURN):
            try:
                count = os.readv(self._fd, [self._buffer])
            except OSError as error:  # nothing there, or the interface is down: epoll tells when that changes
                if error.errno == errno.EBADFD:
                    self._deleted()
                return
            if not self.frontend.receive(self._buffer[:count]):
                self._held = count
                if self._reading and self._loop is not None:
                    self._reading = False
                    self._loop.remove_reader(self._fd)
                return

    def _deleted(self) -> None:
        self.close()
        self.warn(f"netdev {self.name}: tap interface {self._ifname} was deleted, the guest has no network any more")
        self.frontend.link(False)

    def set_offloads(self, features: int) -> None:
        if self._fd >= 0:
            set_offloads(self._fd, features)

    def resume(self) -> None:
        if self._fd < 0 or self._reading:
            return
        if self._held and not self.frontend.receive(self._buffer[: self._held]):
            return
        self._held = 0
        self._listen()

    def send(self, frame: list[memoryview]) -> bool:
        if self._fd < 0:
            return True
        try:
            os.writev(self._fd, frame)
        except BlockingIOError:
            self._refused = True
            assert self._loop is not None
            self._loop.add_writer(self._fd, self._writable)
            return False
        except OSError:
            return True  # the interface is down: the frame is lost
        return True

    def _writable(self) -> None:
        assert self._loop is not None
        self._loop.remove_writer(self._fd)
        if self._refused:
            self._refused = False
            self.frontend.sent()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        self.is_up = False
        if fd >= 0:
            if self._loop is not None:
                self._loop.remove(fd)
            os.close(fd)
