"""The zygote: a small process, warm with every import a VM needs, without thread or ZeroMQ context, that forks VMs.

Forked from the daemon before that has a Context (never fork after one); re-started by exec if it was killed. It is
also the janitor: when the daemon is gone, it kills the VM processes and removes the sockets that were left. It talks to
the daemon by one packet socket, and never to a client.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from kvmcore.server import process, runtime_dir
from protocol.channel import fd_passing, process_memory

log = logging.getLogger("kvmcore.zygote")

MAX_ORDER = 8192
_IDLE_MS = 500
"""Without an order for so long nobody waits for a VM."""


@dataclass(frozen=True)
class VmOrder:
    """What the daemon wants: one VM process. The packet carries two descriptors: control socket, owner's pidfd (or none)."""

    session: str
    pid: int
    uid: int
    key: str
    name: str
    compat: str
    accel: str
    incarnation: int
    door: str
    router: str
    remote: str = ""
    """tcp://HOST:* where a VM of a session over tcp listens, else empty."""
    server_key: tuple[str, str] = ("", "")
    """Then: the server's CURVE pair, public and secret."""
    translator: str = ""
    together: bool = False
    """Whether the session's later VMs shall live in this process too."""
    spare: bool = False
    """Not for anybody yet: session, pid, uid, key, name and compat are to follow, in an order over the control socket."""

    def sweep(self) -> None:
        """The process has ended, killed perhaps: its sockets go, whatever they are called now."""
        for path in (Path(self.door), Path(self.router)):
            for left in path.parent.glob(f"{path.name}*"):
                left.unlink(missing_ok=True)

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> VmOrder:
        return cls(**json.loads(data))


class Zygote:
    """The process's main object. `control` leads to the daemon."""

    def __init__(self, control: socket.socket, private_dir: Path, listen_path: str) -> None:
        self._control = control
        self._private_dir = private_dir
        self._listen_path = listen_path
        self._children: dict[int, tuple[int, VmOrder]] = {}
        """By pidfd: the process, and what it was made for."""

    def run(self) -> None:
        """Fork VMs until the daemon is gone, then clean up after it. Does not return."""
        process.set_title("kvmcore-zygote")
        process.ignore_terminal_signals()
        process_memory.merge()
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        self._preload()
        rehearsed = False
        while True:
            pause = _IDLE_MS if self._children and not rehearsed else None
            ready = poller.poll(pause)
            if not ready:
                self._rehearse()
                rehearsed = True
            for fd, _ in ready:
                if fd == self._control.fileno():
                    if not self._take_order(poller):
                        self._clean_up()
                        os._exit(0)
                else:
                    poller.unregister(fd)
                    pid, order = self._children.pop(fd)
                    os.waitpid(pid, 0)
                    os.close(fd)
                    order.sweep()

    @staticmethod
    def _preload() -> None:
        """Import and build now what every VM needs, and keep the collector from touching (copying) it later."""
        from kvmcore import ioctl
        from kvmcore.server import vm_process

        ioctl.preload()
        vm_process.preload()
        process_memory.settle()

    @staticmethod
    def _rehearse() -> None:
        """When the first VM has been made, and nobody waits for the next: what it has run is warm in those that follow."""
        from kvmcore.server import rehearsal

        try:
            rehearsal.rehearse()
        except Exception:
            log.exception("no rehearsal; VMs start more slowly")
        process_memory.settle()

    def _take_order(self, poller: select.poll) -> bool:
        """Fork one VM; False when the daemon is gone."""
        try:
            data, fds = fd_passing.receive(self._control, MAX_ORDER)
        except OSError:
            return False
        if not data:
            return False
        try:
            order = VmOrder.decode(data)
            me = os.getpid()
            pid = os.fork()
        except OSError as error:
            log.error("no VM process: %s", error)
            fd_passing.close_all(fds)
            return True
        if pid == 0:
            self._become_vm(order, fds, me)
        fd_passing.close_all(fds)
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = pid, order
        poller.register(pidfd, select.POLLIN)
        return True

    def _become_vm(self, order: VmOrder, fds: list[int], parent: int) -> None:
        """In the child: let go of what is the zygote's, and be a VM until it ends."""
        status = 1
        try:
            process.die_with_parent(parent)
            self._control.close()
            fd_passing.close_all(list(self._children))
            from kvmcore.server import vm_process

            vm_process.main(order, fds)
            status = 0
        except BaseException:
            log.exception("VM process failed")
        finally:
            os._exit(status)

    def _clean_up(self) -> None:
        for pidfd, (pid, _) in self._children.items():
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.waitpid(pid, 0)
            except OSError:
                pass  # ended by itself
        for left in self._private_dir.glob("*"):
            left.unlink(missing_ok=True)
        if self._private_dir.is_dir():
            self._private_dir.rmdir()
        runtime_dir.remove_listener(self._listen_path)


def main() -> None:
    """`python -m kvmcore.server.zygote FD PRIVATE_DIR LISTEN_PATH`: a zygote for a daemon whose first one was killed."""
    logging.basicConfig(format="%(name)s: %(message)s")
    fd, private_dir, listen_path = sys.argv[1:4]
    Zygote(socket.socket(fileno=int(fd)), Path(private_dir), listen_path).run()


if __name__ == "__main__":
    main()
