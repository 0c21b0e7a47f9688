"""Kvm: the /dev/kvm of the protocol. Opens a session with a daemon; create_vm() leads to a process of the VM's own, or of
the session's VMs.
"""

from __future__ import annotations

import json
from errno import EINVAL
from typing import NamedTuple

from protocol.abi.compat import Compat
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_NAME
from protocol.channel.zmq_socket import Curve
from protocol.client.handle import Handle
from protocol.client.link import Channel, Link
from protocol.client.remote import RemoteLink
from protocol.client.vm import Vm

_IPC = "ipc://"


class _Shared(NamedTuple):
    """The process that a session's VMs share: how to reach it, the number of its /dev/kvm, its pid."""

    link: Link
    channel: Channel
    number: int
    pid: int


class Kvm(Handle):
    """An open /dev/kvm. Closing it ends the session with the daemon; VMs live on until they are closed."""

    kind = "system"
    _shared: _Shared | None = None

    @classmethod
    def open(
        cls,
        endpoint: str,
        *,
        name: str = "",
        compat: Compat | None = None,
        accel: str = "",
        curve: Curve | None = None,
        together: bool = False,
    ) -> Kvm:
        """A session at ipc://PATH or tcp://HOST:PORT. `name` is what the VM's process is called. KvmError.

        accel: how vCPUs run, "translator", "interpreter" or "reference"; "" leaves that to the daemon.
        together: our VMs share one process of kvmcore, which makes the second and later ones cheap (0.2 instead of 8 ms)
        and lets one that crashes take the others with it; for those that need thousands, one after the other. ipc only.
        tcp needs `curve`: our key pair, and the server's public key. Memory and kvm_run are shared over ipc only.
        """
        body: dict[str, object] = {"name": name[:64]}
        if together:
            body["together"] = True
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
        """A VM, in a process of its own, or of this session's."""
        if self._shared is not None and self._shared.link.alive:
            number = self._shared.channel.request(self._shared.number, BY_NAME["CREATE_VM"].number, type, name="CREATE_VM").ret
            return Vm(self._shared.link, self._shared.channel, number, self._shared.pid, owns_link=False)
        reply = self.channel.request(self.number, BY_NAME["CREATE_VM"].number, type, name="CREATE_VM")
        place = json.loads(reply.extra)
        if isinstance(self.link, RemoteLink):
            other = self.link.elsewhere(int(place["router"].rpartition(":")[2]))
            other.join(self.link.session, self.link.incarnation)
            return Vm(other, other.channel(), reply.ret, int(place["pid"]))
        link = Link(place["door"], {"session": self.link.session.hex()}, "CREATE_VM")
        link.session, link.incarnation = self.link.session, self.link.incarnation
        vm = Vm(link, link.channel(), reply.ret, int(place["pid"]), owns_link="system" not in place)
        vm.door = str(place["door"])
        if "system" in place:
            self.leave_shared()
            self._shared = _Shared(link, vm.channel, int(place["system"]), vm.pid)
        return vm

    @staticmethod
    def attach_vm(door: str, session: bytes, incarnation: int, number: int, pid: int) -> Vm:
        """A VM whose client has died, and which was made to outlive it (Vm.outlive): its handle, and that of a session that
        is ours from now on. Handles of vCPUs and devices are made of the numbers that the dead one had. KvmError: EBUSY
        while it has a client.
        """
        link = Link(door, {"session": session.hex(), "attach": True}, "ATTACH")
        link.session, link.incarnation = session, incarnation
        return Vm(link, link.channel(), number, pid, outlives=True)

    @property
    def shared_number(self) -> int | None:
        """The number of our /dev/kvm in the process that our VMs share; None: there is no such process (yet)."""
        return self._shared.number if self._shared is not None else None

    def leave_shared(self) -> None:
        """The process that our VMs share ends, they with it; the next VM gets a new one."""
        if self._shared is not None:
            self._shared.link.close()
            self._shared = None

    @property
    def alive(self) -> bool:
        """Whether the daemon still answers for us."""
        return self.link.alive

    def close(self) -> None:
        self.closed = True
        self.leave_shared()
        self.link.close()
