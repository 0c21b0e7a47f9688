"""Kvm: the /dev/kvm of the protocol. Opens a session with a daemon; create_vm() leads to a process of the
VM's own.
"""

from __future__ import annotations

import json
from errno import EINVAL

from protocol.abi.compat import Compat
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_NAME
from protocol.channel.zmq_socket import Curve
from protocol.client.handle import Handle
from protocol.client.link import Link
from protocol.client.remote import RemoteLink
from protocol.client.vm import Vm

_IPC = "ipc://"


class Kvm(Handle):
    """An open /dev/kvm. Closing it ends the session with the daemon; VMs live on until they are closed."""

    kind = "system"

    @classmethod
    def open(
        cls, endpoint: str, *, name: str = "", compat: Compat | None = None, accel: str = "", curve: Curve | None = None
    ) -> Kvm:
        """A session at ipc://PATH or tcp://HOST:PORT. `name` is what the VM's process is called. KvmError.

        accel: how vCPUs run, "translator", "interpreter" or "reference"; "" leaves that to the daemon.
        tcp needs `curve`: our key pair, and the server's public key. Memory and kvm_run are shared over ipc only.
        """
        body = {"name": name[:64]}
        if compat is not None:
            body["compat"] = compat.value
        if accel:
            body["accel"] = accel
        if endpoint.startswith("tcp://"):
            if curve is None or not curve.server:
                raise KvmError(EINVAL, "open", f"{endpoint}: tcp needs a key pair and the server's public key")
            remote = RemoteLink(endpoint, curve)
            try:
                remote.hello(body, "open")
            except BaseException:
                remote.close()
                raise
            return cls(remote, remote.channel(), int(remote.welcome["handle"]))
        if not endpoint.startswith(_IPC):
            raise KvmError(EINVAL, "open", f"{endpoint}: expected ipc://PATH or tcp://HOST:PORT")
        link = Link(endpoint[len(_IPC) :], body, "open")
        link.session = bytes.fromhex(link.welcome["session"])
        link.incarnation = int(link.welcome["incarnation"])
        return cls(link, link.channel(), int(link.welcome["handle"]))

    def api_version(self) -> int:
        """12."""
        return self.ioctl("GET_API_VERSION")

    def check_extension(self, capability: int) -> int:
        """A capability's value, 0 for what is not there."""
        return self.ioctl("CHECK_EXTENSION", capability)

    def vcpu_mmap_size(self) -> int:
        """Bytes of a vCPU's mapping."""
        return self.ioctl("GET_VCPU_MMAP_SIZE")

    def create_vm(self, type: int = 0) -> Vm:
        """A VM, in a process of its own."""
        reply = self.channel.request(self.number, BY_NAME["CREATE_VM"].number, type, name="CREATE_VM")
        place = json.loads(reply.extra)
        if isinstance(self.link, RemoteLink):
            other = self.link.elsewhere(int(place["router"].rpartition(":")[2]))
            other.join(self.link.session, self.link.incarnation)
            return Vm(other, other.channel(), reply.ret, int(place["pid"]))
        link = Link(place["door"], {"session": self.link.session.hex()}, "CREATE_VM")
        link.session, link.incarnation = self.link.session, self.link.incarnation
        return Vm(link, link.channel(), reply.ret, int(place["pid"]))

    @property
    def alive(self) -> bool:
        """Whether the daemon still answers for us."""
        return self.link.alive

    def close(self) -> None:
        self.closed = True
        self.link.close()
