"""`-netdev user`: networking without root through passt, a child of ours for as long as the VM lives.

We make the socket pair and hand it one end (--fd), so there is no path to collide or to leave behind; it ends
by itself when our end closes, even if we are killed. DHCP, DNS and the NAT are passt's. hostfwd=tcp::2222-:22
becomes its port forwarding. When it dies the user is told, and another one takes its place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import time
from typing import NamedTuple

from qemu_user.backends.errors import BackendBusy, BackendError
from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.net import launcher
from qemu_user.backends.net.launcher import Launched
from qemu_user.backends.net.restrict import allowed
from qemu_user.backends.net.stream import SocketNet

MISSING = (
    "netdev {name}: passt, which gives the guest a network without root, is not installed; install it "
    "(Debian, Ubuntu: apt install passt; Fedora: dnf install passt; or https://passt.top), "
    "or run without a network (-nic none)"
)
_FORWARD = re.compile(r"(tcp|udp|):([^:\[\]]*|\[[0-9a-fA-F:]+\]):(\d+)-([^:]*):(\d+)\Z")
_GRACE_SECONDS = 2.0
_KEPT_WORDS = 2000
_BURST = 8 << 20
_RESTARTS, _RESTARTS_SECONDS = 3, 60.0
"""So often within so long passt is started again."""
_RESTART_SECONDS = 0.2
_PORTS_SECONDS = 3.0
_HEAD = 128
"""Bytes of a frame that restrict=on looks at."""


class Forward(NamedTuple):
    """A hostfwd rule. `host`: an address of the host, "" for all."""

    protocol: str
    host: str
    port: int
    guest_port: int

    @classmethod
    def parse(cls, rule: str) -> Forward:
        """Of QEMU's `tcp:HOST:PORT-GUEST:PORT`; there is one guest, its address makes no difference. BackendError."""
        match = _FORWARD.match(rule)
        if match is None:
            raise BackendError(f"hostfwd={rule}: expected tcp|udp:[host address]:port-[guest address]:port")
        protocol, host, port, _, guest_port = match.groups()
        for number in (port, guest_port):
            if not 0 < int(number) < 65536:
                raise BackendError(f"hostfwd={rule}: port {number} is not between 1 and 65535")
        return cls(protocol or "tcp", host.strip("[]"), int(port), int(guest_port))

    def option(self) -> list[str]:
        """As passt's option."""
        address = f"{self.host}/" if self.host else ""
        return ["-t" if self.protocol == "tcp" else "-u", f"{address}{self.port}:{self.guest_port}"]

    def busy(self, name: str) -> str:
        """Why the port cannot be had now; "" if it can."""
        try:
            self.check(name)
        except BackendError as error:
            return str(error)
        return ""

    def check(self, name: str) -> None:
        """passt says nothing of a port that it cannot have: try. BackendError."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        kind = socket.SOCK_STREAM if self.protocol == "tcp" else socket.SOCK_DGRAM
        with socket.socket(family, kind) as probe:
            if self.protocol == "tcp":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are ending do no harm
            try:
                probe.bind((self.host, self.port))
                if self.protocol == "tcp":
                    probe.listen(1)
            except OSError as error:
                where = f"{self.host or '*'}:{self.port}"
                if isinstance(error, PermissionError):
                    why = "is not allowed to this user (ports below 1024 are root's)"
                elif error.errno == errno.EADDRINUSE:
                    why = "is in use already; choose another port"
                else:
                    why = f"cannot be had: {error.strerror or error}"
                what = BackendBusy if error.errno == errno.EADDRINUSE else BackendError
                raise what(f"netdev {name}: {self.protocol} port {where} of the host {why}") from error


class UserNetwork(NamedTuple):
    """What the guest is to see; "" is passt's choice, which is the host's own."""

    network: str = ""
    """IPv4, ADDRESS/BITS, with `gateway` and `address`."""
    gateway: str = ""
    address: str = ""
    dns: str = ""
    search: tuple[str, ...] = ()
    restrict: bool = False
    ipv4: bool = True
    ipv6: bool = True

    def options(self) -> list[str]:
        """As passt's."""
        words = ["--ipv4-only"] if not self.ipv6 else ["--ipv6-only"] if not self.ipv4 else []
        if self.network:
            words += ["-a", self.address, "-n", self.network.partition("/")[2], "-g", self.gateway]
        if self.dns:
            words += ["-D", self.dns, "--dns-forward", self.dns]
        if self.search:
            words += ["-S", " ".join(self.search)]
        return words


_AS_THE_HOST = UserNetwork()


class PasstNet(SocketNet):
    """`forwards`: QEMU's hostfwd rules."""

    mtu = 65520
    """passt's own; large frames are what makes it fast."""
    trusted = True

    def __init__(self, name: str, forwards: tuple[str, ...] = (), network: UserNetwork = _AS_THE_HOST) -> None:
        super().__init__(name)
        self._forwards = [Forward.parse(rule) for rule in forwards]
        self._network = network
        self._restrict = network.restrict
        self._udp_ports = frozenset(forward.guest_port for forward in self._forwards if forward.protocol == "udp")
        self._child: Child | Launched | None = None
        self._errors = -1
        self._said = b""
        self._starts: list[float] = []
        self._closed = False
        self._wanted = 0.0
        """Since when the VM, running here, has no passt because of its ports."""
        program = shutil.which("passt")
        if program is None:
            raise BackendError(MISSING.format(name=name))
        self._program = program

    def start(self, loop: IoLoop) -> None:
        self._loop = loop
        try:
            for forward in self._forwards:
                forward.check(self.name)
        except BackendBusy:
            if not self.arriving:
                raise
            loop.call_later(_RESTART_SECONDS, self._await_ports)
        else:
            self._spawn(loop)

    def _await_ports(self) -> None:
        """The VM comes from elsewhere: its ports are its source's, as long as that is there. Once the VM runs here it gets a
        network soon, with the ports that there are then.
        """
        if self._closed or self._loop is None:
            return
        busy = [why for forward in self._forwards if (why := forward.busy(self.name))]
        if busy and not (self._wanted and time.monotonic() - self._wanted > _PORTS_SECONDS):
            self._loop.call_later(_RESTART_SECONDS, self._await_ports)
            return
        for why in busy:
            self.warn(f"{why}; it does not lead to this VM")
        self._forwards = [forward for forward in self._forwards if not forward.busy(self.name)]
        self._restart()

    def _spawn(self, loop: IoLoop) -> None:
        self._loop = loop
        self._starts.append(time.monotonic())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        # passt drops what does not fit, which its TCP notices only by a timeout: a window's worth has to.
        with contextlib.suppress(OSError):
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BURST)
        errors, theirs_errors = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # As root it would become nobody, which a container may not allow. It needs no privilege: it stays who
        # we are.
        who = ["--runas", f"{os.getuid()}:{os.getgid()}"] if os.getuid() == 0 else []
        ports = [word for forward in self._forwards for word in forward.option()]
        words = ["-f", "-q", "-1", *who, *self._network.options(), *ports, "--fd", "3"]
        try:
            if launcher.launcher is not None:
                self._child = launcher.launcher.start(words, theirs.fileno(), theirs_errors)
            else:
                self._child = Child(launcher.spawn(self._program, words, theirs.fileno(), theirs_errors))
        except OSError as error:
            ours.close()
            os.close(errors)
            raise BackendError(
                f"netdev {self.name}: cannot start {self._program}: {error.strerror}"
            ) from error
        finally:
            theirs.close()
            os.close(theirs_errors)
        self._errors = errors
        loop.add_reader(errors, self._read_errors)
        self._use(ours)

    def _read_errors(self) -> None:
        try:
            data = os.read(self._errors, 4096)
        except BlockingIOError:
            return
        if not data:
            self._close_errors()
        self._said = (self._said + data)[-_KEPT_WORDS:]

    def _close_errors(self) -> None:
        if self._errors >= 0:
            if self._loop is not None:
                self._loop.remove(self._errors)
            os.close(self._errors)
            self._errors = -1

    def send(self, frame: list[memoryview]) -> bool:
        if self._child is None and not self._wanted:
            self._wanted = time.monotonic()
        if self._restrict and not allowed(b"".join(frame)[:_HEAD], self._udp_ports):
            return True
        return super().send(frame)

    def _lost(self) -> None:
        super()._lost()
        words = " ".join(
            line for line in self._said.decode(errors="replace").splitlines() if "syslog" not in line
        )
        self._said = b""
        self._close_errors()
        child, self._child = self._child, None
        if child is not None:
            child.reap()
        said = f" ({words})" if words else ""
        now = time.monotonic()
        self._starts = [start for start in self._starts if now - start < _RESTARTS_SECONDS]
        if len(self._starts) > _RESTARTS:
            self.warn(f"netdev {self.name}: passt ended{said}, the guest has no network any more")
            return
        self.warn(f"netdev {self.name}: passt ended{said}; it is started again, connections are lost")
        if self._loop is not None:
            self._loop.call_later(_RESTART_SECONDS, self._restart)

    def _restart(self) -> None:
        if self._closed or self._loop is None:
            return
        try:
            self._spawn(self._loop)
        except BackendError as error:
            self.warn(f"{error}; the guest has no network any more")

    def close(self) -> None:
        self._closed = True
        super().close()
        self._close_errors()
        child, self._child = self._child, None
        if child is not None:
            child.reap()


class Child(NamedTuple):
    """A passt that is a child of this process."""

    pid: int

    def reap(self) -> None:
        """End it and wait for it."""
        reap(self.pid)


def reap(child: int) -> None:
    """End a child of ours and wait for it: politely, then not."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGTERM)
    until = time.monotonic() + _GRACE_SECONDS
    while True:
        try:
            if os.waitpid(child, os.WNOHANG)[0]:
                return
        except ChildProcessError:
            return
        if time.monotonic() > until:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            until = float("inf")
        time.sleep(0.002)
