"""`-netdev switch`: a port of `softkvm switch`, found by the switch's name or by its socket's path.

The port says who it is and what it wants to be (a VLAN, say); frames carry virtio-net headers, so that checksums stay open and
64 KiB segments uncut between VMs. A switch that ends takes the link down; it is called again every second.
"""

from __future__ import annotations

import select
import socket

from protocol.codec import switch_hello
from protocol.codec.switch_hello import Hello, HelloError, Welcome
from qemu_user.backends.errors import BackendError
from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.net.stream import SocketNet

_RETRY_SECONDS = 1.0
_ANSWER_SECONDS = 10.0


class SwitchNet(SocketNet):
    """`path`: the switch's port.sock; `port`: VM/NETDEV; `settings`: in the words of qemu_user/switch/settings.py."""

    virtio_header = True

    def __init__(self, name: str, path: str, switch: str, port: str, settings: str = "") -> None:
        super().__init__(name)
        self._path, self._switch = path, switch
        self._hello = switch_hello.pack(Hello(name=port, settings=settings))
        self._asking: socket.socket | None = None
        self._closed = False

    def start(self, loop: IoLoop) -> None:
        self._loop = loop
        sock = self._call()
        if sock is None:
            raise BackendError(
                f"netdev {self.name}: no switch {self._switch} is running (nobody listens on {self._path}); "
                f"start it with: softkvm switch run -d {self._switch}"
            )
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        if not poll.poll(_ANSWER_SECONDS * 1000):
            sock.close()
            raise BackendError(f"netdev {self.name}: switch {self._switch} does not answer")
        if refusal := self._answered(sock):
            raise BackendError(f"netdev {self.name}: switch {self._switch} refuses: {refusal}")

    def _call(self) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(self._path)
            sock.send(self._hello)
        except OSError:
            sock.close()
            return None
        return sock

    def _answered(self, sock: socket.socket) -> str:
        """The switch's answer is there: plug in, or say why not."""
        try:
            # Frames may come right behind it: they stay where they are.
            head = sock.recv(switch_hello.MAX_HELLO, socket.MSG_PEEK)
            welcome = switch_hello.unpack(head, Welcome)
            if welcome is None:
                raise HelloError("it has hung up")
            sock.recv(switch_hello.size(head))
        except (OSError, HelloError) as error:
            welcome = Welcome(error=str(error))
        if welcome.error:
            sock.close()
        else:
            self._use(sock)
        return welcome.error

    def _lost(self) -> None:
        super()._lost()
        self.warn(f"netdev {self.name}: switch {self._switch} is gone; called again until it is back")
        self._again()

    def _again(self) -> None:
        def call() -> None:
            if self._closed or self._loop is None:
                return
            sock = self._call()
            if sock is None:
                self._again()
                return
            self._asking = sock
            loop = self._loop

            def readable() -> None:
                loop.remove(sock.fileno())
                self._asking = None
                if self._answered(sock):
                    self._again()

            loop.add_reader(sock.fileno(), readable)

        if self._loop is not None and not self._closed:
            self._loop.call_later(_RETRY_SECONDS, call)

    def close(self) -> None:
        self._closed = True
        super().close()
        asking, self._asking = self._asking, None
        if asking is not None:
            if self._loop is not None:
                self._loop.remove(asking.fileno())
            asking.close()
