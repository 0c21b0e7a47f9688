"""The main loop of a VM process: its door, its ROUTER, its one session, its Vm.

Forked from the zygote. The main thread is the I/O loop; each vCPU has a thread of its own (kvmcore/vm/vcpu.py). It ends,
and everything with it, when the VM is destroyed, its owner dies, or the daemon is gone. A spare one is made before anybody
wants it, and hears for whom it is when it is taken. A session that has asked for it
("together") has all its VMs in one such process: it has a /dev/kvm handle of its own there, and the process stays until
the session ends. Never do VMs of two sessions meet in a process. Must never import llvmlite.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from errno import EBUSY, EIO, EMFILE, EPERM
from typing import TYPE_CHECKING

from kvmcore.server import confinement, process, runtime_dir, watchdog
from kvmcore.server.acceptor import Acceptor, Connection, Refused
from kvmcore.server.loop import EventLoop
from kvmcore.server.quotas import Quotas
from kvmcore.server.session import ClientSession, Peer
from kvmcore.server.zygote import MAX_ORDER, VmOrder
from kvmcore.vm.objects import System
from kvmcore.vm.vm import Vm, spare_machine
from protocol.abi.compat import Compat
from protocol.abi.errors import KvmError
from protocol.channel import fd_passing
from protocol.codec.session import Message

if TYPE_CHECKING:
    from kvmcore.server.remote import RemoteDoor

log = logging.getLogger("kvmcore.vm")

#: A vCPU thread gets this long to leave the guest before the process ends regardless.
_JOIN_SECONDS = 0.1
_IDLE_LOOK_SECONDS = 5.0


def preload() -> None:
    """In the zygote: what every VM process needs and what is safe to inherit over fork."""
    import kvmcore.engine.hot_code
    import kvmcore.server.connections
    import kvmcore.server.router
    import kvmcore.vm.vcpu  # noqa: F401
    from kvmcore.vm.accelerator import preload_image

    preload_image()
    confinement.readable()


class VmSystem(System):
    """/dev/kvm in a process that its session's VMs share."""

    def __init__(self, session: ClientSession, process: VmProcess) -> None:
        super().__init__(session)
        self._process = process

    def create_vm(self, machine_type: int) -> Vm:
        """Another VM in this process."""
        return self._process.create_vm()


class VmProcess:
    """One VM and what surrounds it. Implements the acceptor's DoorOwner. take() it before run()."""

    def __init__(self, order: VmOrder, control: socket.socket) -> None:
        """What does not depend on whom it is for."""
        from kvmcore.server.connections import ConnectionLimit
        from protocol.channel import zmq_socket

        self._order = order
        self._control = control
        self._loop = EventLoop()
        quotas = self._quotas = Quotas.of_this_process()
        self._files = [order.door, order.router]
        self._acceptor = Acceptor(self._loop, runtime_dir.bind_inside(order.door), self, limit=8)
        self._context = zmq_socket.context()
        self._door: RemoteDoor | None = None
        if not order.remote:
            self._socket = zmq_socket.router(self._context, f"ipc://{order.router}")
        self._limit = None if order.remote else ConnectionLimit(self._socket, f"ipc://{order.router}", quotas.connections)
        self._machine = spare_machine(order.translator) if order.spare else None
        self._vms: set[Vm] = set()
        self._connection: Connection | None = None

    def take(self, order: VmOrder, owner_pidfd: int | None = None) -> None:
        """It is for this order's session from now on."""
        from kvmcore.server.router import Router

        self._order, quotas = order, self._quotas
        self._session = ClientSession(
            bytes.fromhex(order.session),
            Peer(order.pid, order.uid, order.key),
            quotas,
            name=order.name,
            compat=Compat(order.compat),
        )
        if order.remote:
            self._door = self._open_door()
            self._socket = self._door.socket
        sessions = {self._session.id: self._session}
        self._router = Router(self._loop, self._socket, order.incarnation, sessions, quotas)
        self._most_vms = quotas.vms_per_session if order.together else 1
        self._system = self._session.install(VmSystem(self._session, self)) if order.together else 0
        self._number = self._session.install(self.create_vm())
        self._loop.add_reader(self._control.fileno(), self._daemon_is_gone)
        self._owner_pidfd = owner_pidfd if owner_pidfd is not None else -1
        if owner_pidfd is not None:
            self._loop.add_reader(owner_pidfd, self._owner_is_gone)
            watchdog.watch(owner_pidfd, self._may_outlive, lambda: os._exit(1))

    def run(self) -> None:
        """Say that we are ready, then serve until the end."""
        pidfd = os.pidfd_open(os.getpid())
        ready: dict[str, object] = {"handle": self._number, "pid": os.getpid()}
        if self._door is not None:
            ready["router"] = self._door.endpoint
        if self._system:
            ready["system"] = self._system
        try:
            fd_passing.send(self._control, json.dumps(ready).encode(), [pidfd])
        except OSError:  # the daemon, or the client that asked for us, has gone meanwhile
            self._end()
        os.close(pidfd)
        if not self._order.together:
            self._loop.call_later(_IDLE_LOOK_SECONDS, self._look_if_idle)
        self._loop.run()

    def _look_if_idle(self) -> None:
        """VMs that do nothing give memory back."""
        for vm in self._vms:
            vm.look_if_idle()
        self._loop.call_later(_IDLE_LOOK_SECONDS, self._look_if_idle)

    def create_vm(self) -> Vm:
        """A VM in this process. EMFILE: as many as the session may have, those included that are not quite gone."""
        if len(self._vms) >= self._most_vms:
            raise KvmError(EMFILE, "CREATE_VM", "too many VMs")
        order = self._order
        machine, self._machine = self._machine, None
        vm = Vm(
            self._session, self._loop, name=order.name, accel=order.accel, translator=order.translator, machine=machine
        )
        self._vms.add(vm)
        if order.together:
            vm.on_idle = lambda: self._gone(vm)
        else:
            vm.on_destroyed = lambda: self._loop.call_soon_threadsafe(self._end)
        return vm

    def _gone(self, vm: Vm) -> None:
        """A VM of several has been destroyed: nothing of it may stay."""
        vm.release()
        self._vms.discard(vm)

    def _open_door(self) -> RemoteDoor:
        """The owner is on another machine: nobody but its key gets in, and it is there as long as it says so."""
        from kvmcore.server.remote import RemoteDoor, watch_leases
        from protocol.channel.zmq_socket import Curve

        public, secret = (word.encode() for word in self._order.server_key)
        watch_leases(self._loop, lambda: [self._session], lambda session: self._lease_is_over())
        return RemoteDoor(self._context, self._order.remote, Curve(public, secret), [self._order.key])

    def _lease_is_over(self) -> None:
        log.info("VM %s: its owner, %s, is gone", self._order.name or self._number, self._session.peer)
        self._session.close()
        self._end()

    # -- DoorOwner --------------------------------------------------------------------------------------------

    def hello(
        self, connection: Connection, message: Message
    ) -> tuple[ClientSession, dict[str, object], list[int]]:
        """Only the process that created the VM gets in, once at a time; or who takes its place when it is dead."""
        if message.body.get("attach"):
            return self._attach(connection, message)
        if connection.peer.pid != self._session.peer.pid or message.body.get("session") != self._order.session:
            raise Refused(EPERM, "this VM belongs to another session")
        if self._connection is not None:
            raise Refused(EPERM, "this VM's session is connected")
        if self._session.dead:
            raise Refused(EIO, "this VM is dead")
        self._connection = connection
        fd_passing.send(self._control, b'{"attached": true}', block=False)
        return self._session, {"handle": self._number, "router": f"ipc://{self._order.router}"}, []

    def _attach(
        self, connection: Connection, message: Message
    ) -> tuple[ClientSession, dict[str, object], list[int]]:
        """A process takes the place of the owner, which has died: it knows the session's id."""
        if message.body.get("session") != self._order.session:
            raise Refused(EPERM, "this VM belongs to another session")
        if self._session.dead:
            raise Refused(EIO, "this VM is dead")
        if self._connection is not None:
            raise Refused(EBUSY, "this VM has its device process")
        self._connection = connection
        for vm in self._vms:
            vm.eventfds.release()
        self._session.pass_on(connection.peer)
        log.info("VM %s: process %d attaches", self._order.name or self._number, connection.peer.pid)
        return self._session, {"handle": self._number, "router": f"ipc://{self._order.router}"}, []

    def goodbye(self, connection: Connection, session: ClientSession) -> None:
        """The owner has hung up: what it held is closed, which ends the VM, unless it shall outlive it."""
        if session.outlives:
            log.warning("VM %s: its device process is gone; it waits for another one", self._order.name or self._number)
            self._connection = None
            return
        log.info("VM %s: its session has ended", self._order.name or self._number)
        session.close()
        self._end()

    # -- the end ----------------------------------------------------------------------------------------------

    def _daemon_is_gone(self) -> None:
        try:
            data, fds = fd_passing.receive(self._control, 256, block=False)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        fd_passing.close_all(fds)
        if not data:
            log.info("VM %s: the daemon is gone", self._order.name or self._number)
            self._end()

    def _owner_is_gone(self) -> None:
        self._loop.remove_reader(self._owner_pidfd)
        if not self._session.outlives:
            log.info("VM %s: process %d has died", self._order.name or self._number, self._order.pid)
            self._end()

    def _may_outlive(self) -> bool:
        """Whether the VM goes on though the process that made it is dead."""
        return self._session.outlives or self._session.peer.pid != self._order.pid

    def _end(self) -> None:
        """Leave nothing: stop the vCPUs, remove the sockets, exit. The kernel frees memory and descriptors."""
        vms = list(self._vms)
        for vm in vms:
            vm.destroy()
        for vcpu in [vcpu for vm in vms for vcpu in vm.vcpus]:
            vcpu.join(_JOIN_SECONDS)
        for vm in vms:
            vm.farewell()
        if self._limit is not None:
            self._limit.stop()
        self._socket.close(linger=100)  # the reply to the CLOSE that ended the VM may be on its way
        if self._door is not None:
            self._door.close()
        self._context.term()
        for path in self._files:
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def main(order: VmOrder, fds: list[int]) -> None:
    """Be the VM process of `order`. `fds`: control socket, then the owner's pidfd if it is a local process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    fd_passing.make_room()
    control = socket.socket(fileno=fds.pop(0))
    process.set_title("kvmcore-spare" if order.spare else _title(order))
    confinement.files(os.path.dirname(order.door), network=bool(order.remote))
    made = VmProcess(order, control)
    if order.spare:
        confinement.calls()
        order, fds = _wait(order, control)
        process.set_title(_title(order))
        made.take(order, *fds)
    else:
        made.take(order, *fds)
        confinement.calls()
    made.run()


def _title(order: VmOrder) -> str:
    return f"kvmcore-vm {order.name}" if order.name else "kvmcore-vm"


def _wait(order: VmOrder, control: socket.socket) -> tuple[VmOrder, list[int]]:
    """Until somebody wants a VM: the order, and its owner's pidfd. Does not return if the daemon does not want us any more."""
    try:
        data, fds = fd_passing.receive(control, MAX_ORDER)
    except OSError:
        data, fds = b"", []
    if not data:
        order.sweep()
        os._exit(0)
    return VmOrder.decode(data), fds
