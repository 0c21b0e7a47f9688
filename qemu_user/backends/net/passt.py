"""`-netdev user`: networking without root through passt, a child of ours for as long as the VM lives.

We make the socket pair and hand it one end (--fd), so there is no path to collide or to leave behind; it ends
by itself when our end closes, even if we are killed. DHCP, DNS and the NAT are passt's. hostfwd=tcp::2222-:22
becomes its port forwarding.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import time

from qemu_user.backends.errors import BackendError
from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.net.stream import SocketNet

MISSING = (
    "netdev {name}: passt, which gives the guest a network without root, is not installed; install it "
    "(Debian, Ubuntu: apt install passt; Fedora: dnf install passt; or https://passt.top), "
    "or run without a network (-nic none)"
)
_FORWARD = re.compile(r"(tcp|udp):([^:]*):(\d+)-([^:]*):(\d+)\Z")
_GRACE_SECONDS = 2.0
_KEPT_WORDS = 2000


def forward_option(rule: str) -> list[str]:
    """QEMU's hostfwd rule as passt's option. BackendError if it is none."""
    match = _FORWARD.match(rule)
    if match is None:
        raise BackendError(f"hostfwd={rule}: expected tcp|udp:[host address]:port-[guest address]:port")
    protocol, host, port, _, guest_port = match.groups()
    for number in (port, guest_port):
        if not 0 < int(number) < 65536:
            raise BackendError(f"hostfwd={rule}: port {number} is not between 1 and 65535")
    address = f"{host}/" if host else ""
    return ["-t" if protocol == "tcp" else "-u", f"{address}{port}:{guest_port}"]


class PasstNet(SocketNet):
    """`forwards`: QEMU's hostfwd rules."""

    mtu = 65520
    """passt's own; large frames are what makes it fast."""
    trusted = True

    def __init__(self, name: str, forwards: tuple[str, ...] = ()) -> None:
        super().__init__(name)
        self._options = [word for rule in forwards for word in forward_option(rule)]
        self._child = 0
        self._errors = -1
        self._said = b""
        program = shutil.which("passt")
        if program is None:
            raise BackendError(MISSING.format(name=name))
        self._program = program

    def start(self, loop: IoLoop) -> None:
        self._loop = loop
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        errors, theirs_errors = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        # As root it would become nobody, which a container may not allow. It needs no privilege: it stays who
        # we are.
        who = ["--runas", f"{os.getuid()}:{os.getgid()}"] if os.getuid() == 0 else []
        command = [self._program, "-f", "-q", "-1", *who, *self._options, "--fd", "3"]
        actions = [(os.POSIX_SPAWN_DUP2, fd, to) for fd, to in ((null, 0), (null, 1), (theirs_errors, 2))]
        try:
            self._child = os.posix_spawn(
                self._program,
                command,
                os.environ,
                file_actions=[*actions, (os.POSIX_SPAWN_DUP2, theirs.fileno(), 3)],
                setsid=True,
            )
        except OSError as error:
            ours.close()
            os.close(errors)
            raise BackendError(
                f"netdev {self.name}: cannot start {self._program}: {error.strerror}"
            ) from error
        finally:
            theirs.close()
            os.close(theirs_errors)
            os.close(null)
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

    def _lost(self) -> None:
        super()._lost()
        words = " ".join(
            line for line in self._said.decode(errors="replace").splitlines() if "syslog" not in line
        )
        self.warn(
            f"netdev {self.name}: passt ended, the guest has no network any more"
            + (f" ({words})" if words else "")
        )

    def close(self) -> None:
        super().close()
        self._close_errors()
        child, self._child = self._child, 0
        if child:
            reap(child)


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
