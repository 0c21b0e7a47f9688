"""The kvmcore daemon: answers for /dev/kvm, opens sessions, has the zygote make VM processes, keeps the list of them.

Started by kvmcore/__main__.py. One thread, one I/O loop. VM, vCPU and device ioctls never come here: CREATE_VM's reply names
the VM's own door. Implements the acceptor's DoorOwner. Must never run anything on behalf of a VM.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from errno import EINVAL, EIO, EMFILE
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmcore.server import confinement, requests, runtime_dir
from kvmcore.server.acceptor import Acceptor, Connection, Refused
from kvmcore.server.loop import EventLoop
from kvmcore.server.quotas import Quotas
from kvmcore.server.requests import Ticket
from kvmcore.server.runtime_dir import PrivateDirectory
from kvmcore.server.session import ClientSession, Peer
from kvmcore.server.translator import TranslatorProcess
from kvmcore.server.zygote import VmOrder, Zygote
from kvmcore.vm.accelerator import ACCELERATORS, INTERPRETER, TRANSLATOR
from kvmcore.vm.objects import Deferred, System
from protocol.abi.compat import Compat
from protocol.abi.errors import KvmError
from protocol.channel import fd_passing
from protocol.codec.session import Message

if TYPE_CHECKING:
    from kvmcore.server.remote import Remote, RemoteDoor

log = logging.getLogger("kvmcore.daemon")

MAX_NAME = 64
_TRANSLATOR_DELAY = 0.3
_SPARE_DELAY = 1.0
#: Between two looks whether the translator has done what is left, and how long it gets for it.
_IDLE_WORK_SECONDS, _IDLE_WORK_AT_MOST = 5.0, 1800.0


@dataclass(frozen=True)
class Options:
    """What the command line said."""

    path: str
    compat: Compat = Compat.DEFAULT
    accel: str = TRANSLATOR
    idle_timeout: float = 0.0
    ready_fd: int = -1
    remote: Remote | None = None


@dataclass(eq=False)
class VmRecord:
    """A VM process, as the daemon knows it. `ticket` is the CREATE_VM that waits for it, None once answered."""

    session: ClientSession
    control: socket.socket
    order: VmOrder
    ticket: Ticket | None
    pidfd: int = -1
    pid: int = 0
    attached: bool = False
    was_spare: bool = False
    label: str = field(default="", init=False)


class DaemonSystem(System):
    """/dev/kvm in the daemon."""

    def __init__(self, session: ClientSession, daemon: Daemon) -> None:
        super().__init__(session)
        self._daemon = daemon

    def create_vm(self, machine_type: int) -> Deferred:
        """Have a VM process made; its handle is the reply's value, its door in the reply's extra."""
        return self._daemon.create_vm(requests.current[-1])


def start_zygote(control: socket.socket, private: PrivateDirectory, path: str, close: Callable[[], None]) -> None:
    """Fork the first zygote. `close` drops, in the child, what is the daemon's. No Context may exist yet."""
    if os.fork() != 0:
        return
    try:
        close()
        Zygote(control, private.path, path).run()
    finally:
        os._exit(1)


class Daemon:
    """The whole of it. serve() returns when it has been told to stop."""

    def __init__(
        self, options: Options, listener: socket.socket, private: PrivateDirectory, zygote: socket.socket
    ) -> None:
        from kvmcore.server.connections import ConnectionLimit
        from kvmcore.server.router import Router
        from protocol.channel import zmq_socket

        self._options = options
        self._private = private
        self._zygote = zygote
        self._quotas = Quotas.of_this_process()
        self._incarnation = secrets.randbits(64)
        self._sessions: dict[bytes, ClientSession] = {}
        self._vms: set[VmRecord] = set()
        self._loop = EventLoop()
        self._translator = TranslatorProcess(private, self._loop)
        self._idle_since = 0
        self._spare: tuple[socket.socket, VmOrder] | None = None
        self._spare_is_due = False
        self._retired = False
        self._context = zmq_socket.context()
        self._endpoint = f"ipc://{private.name('r')}"
        self._socket = zmq_socket.router(self._context, self._endpoint)
        self._router = Router(self._loop, self._socket, self._incarnation, self._sessions, self._quotas, self._quotas.rate)
        self._limit = ConnectionLimit(self._socket, self._endpoint, self._quotas.connections)
        self._acceptor = Acceptor(self._loop, listener, self, limit=self._quotas.sessions)
        self._door = self._open_door(options.remote) if options.remote is not None else None
        self._loop.add_reader(zygote.fileno(), self._zygote_is_gone)
        self._wake_on_signals()

    def _open_door(self, wanted: Remote) -> RemoteDoor:
        """Listen on tcp as well. zmq.ZMQError."""
        from kvmcore.server.remote import RemoteDoor, greet, watch_leases
        from kvmcore.server.router import Router

        door = RemoteDoor(self._context, wanted.endpoint, wanted.curve, wanted.peers)
        router = Router(self._loop, door.socket, self._incarnation, self._sessions, self._quotas, self._quotas.rate)
        router.on_hello = greet(self._hello_over_tcp)
        watch_leases(self._loop, self._sessions.values, self.close_session)
        return door

    def _hello_over_tcp(self, key: str, wishes: dict[str, object]) -> dict[str, object]:
        assert self._door is not None
        session = self.open_session(Peer(key=key), wishes)
        return self.describe(session, self._door.endpoint)

    def serve(self) -> None:
        """Until SIGTERM, SIGINT, or the idle timeout."""
        log.info("listening on %s", self._options.path)
        for what in confinement.missing():
            log.warning("VM processes are confined without %s: this host has none (softkvm doctor)", what)
        if self._door is not None:
            log.info("listening on %s", self._door.endpoint)
        if self._options.ready_fd >= 0:
            with suppress(BrokenPipeError):  # whoever started us has found that it needs no VM
                os.write(self._options.ready_fd, b"ready\n")
            os.close(self._options.ready_fd)
        self._note_idle()
        self._loop.run()
        self._close()

    def _close(self) -> None:
        self._acceptor.close()
        self._limit.stop()
        self._socket.close(linger=0)
        if self._door is not None:
            self._door.close()
        self._context.term()
        self._zygote.close()  # the zygote kills the VM processes that are left
        runtime_dir.remove_listener(self._options.path)
        self._private.remove()

    def _wake_on_signals(self) -> None:
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        self._loop.add_reader(read, self._loop.stop)

    # -- sessions (DoorOwner) ---------------------------------------------------------------------------------

    def hello(
        self, connection: Connection, message: Message
    ) -> tuple[ClientSession, dict[str, object], list[int]]:
        """Open a session for a local process; with `retire`, it is the last one."""
        if message.body.get("retire") is True:
            self._retire()
        session = self.open_session(connection.peer, message.body)
        return session, self.describe(session, self._endpoint), []

    def open_session(self, peer: Peer, wishes: dict[str, object]) -> ClientSession:
        """A new session. Refused: too many, or wishes that make no sense."""
        if len(self._sessions) >= self._quotas.sessions:
            raise Refused(EMFILE, f"at most {self._quotas.sessions} sessions")
        name = wishes.get("name", "")
        try:
            compat = Compat(wishes.get("compat", self._options.compat.value))
        except ValueError as error:
            raise Refused(EINVAL, f"{error}; compat is one of {[c.value for c in Compat]}") from None
        accel = wishes.get("accel", self._options.accel)
        if accel not in ACCELERATORS:
            raise Refused(EINVAL, f"{accel!r} is no accelerator; there are {', '.join(ACCELERATORS)}")
        if not isinstance(name, str) or len(name) > MAX_NAME:
            raise Refused(EINVAL, f"a name has at most {MAX_NAME} characters")
        together = wishes.get("together", False)
        if not isinstance(together, bool) or (together and peer.key):
            raise Refused(EINVAL, "together is true or false, and over tcp false")
        session = ClientSession(ClientSession.new_id(), peer, self._quotas, name=name, compat=compat)
        session.accel = str(accel)
        session.together = together
        self._sessions[session.id] = session
        return session

    def describe(self, session: ClientSession, endpoint: str) -> dict[str, object]:
        """What a hello is answered with: how to reach the ROUTER, and the number of the /dev/kvm handle."""
        return {
            "session": session.id.hex(),
            "incarnation": self._incarnation,
            "router": endpoint,
            "handle": session.install(DaemonSystem(session, self)),
            "pid": os.getpid(),
        }

    def goodbye(self, connection: Connection, session: ClientSession) -> None:
        """The client has closed its /dev/kvm, or died. VMs that it is attached to look after themselves."""
        self.close_session(session)

    def close_session(self, session: ClientSession) -> None:
        """Forget a session; VMs that it has created but not attached to have nobody: they go."""
        self._sessions.pop(session.id, None)
        session.close()
        for vm in [vm for vm in self._vms if vm.session is session and not vm.attached]:
            self._forget_vm(vm)
        self._note_idle()

    # -- VMs --------------------------------------------------------------------------------------------------

    def create_vm(self, ticket: Ticket) -> Deferred:
        """Order a VM process. EMFILE: quota. EIO: the zygote does not answer."""
        session = ticket.session
        mine = sum(1 for vm in self._vms if vm.session is session)
        if len(self._vms) >= self._quotas.vms or mine >= self._quotas.vms_per_session:
            raise KvmError(EMFILE, "CREATE_VM", "too many VMs")
        accel = session.accel
        if session.together and accel == TRANSLATOR:
            accel = INTERPRETER  # a new translator's arena takes the old one's place, which another VM may be running
        order = VmOrder(
            session=session.id.hex(),
            pid=session.peer.pid,
            uid=session.peer.uid,
            key=session.peer.key,
            name=session.name,
            compat=session.compat.value,
            accel=accel,
            translator=self._translator.path if accel == TRANSLATOR else "",
            **self._remote_order(session),
            incarnation=self._incarnation,
            together=session.together,
            door=self._private.name("d"),
            router=self._private.name("v"),
        )
        try:
            vm = self._from_spare(order, ticket) or self._from_zygote(order, ticket)
        except OSError as error:
            raise KvmError(EIO, "CREATE_VM", f"no VM process: {error}") from error
        if order.translator:  # not at once: starting takes a core, which the VM's start needs more
            self._loop.call_later(_TRANSLATOR_DELAY, self._translator.start)
        self._expect(vm)
        return Deferred()

    def _from_zygote(self, order: VmOrder, ticket: Ticket) -> VmRecord:
        """A process that is forked now. OSError."""
        ours, theirs = fd_passing.pair()
        pid = order.pid
        with theirs:
            try:
                owner = [os.pidfd_open(pid)] if pid else []
                try:
                    fd_passing.send(self._zygote, order.encode(), [theirs.fileno(), *owner])
                finally:
                    fd_passing.close_all(owner)
            except OSError:
                ours.close()
                raise
        return VmRecord(ticket.session, ours, order, ticket)

    def _expect(self, vm: VmRecord) -> None:
        """A process is to be this VM's; what comes after it is not so pressing: another spare one."""
        self._vms.add(vm)
        self._loop.add_reader(vm.control.fileno(), lambda: self._vm_says(vm))
        if not self._spare_is_due and self._spare is None:
            self._spare_is_due = True
            self._loop.call_later(_SPARE_DELAY, self._make_spare)

    # -- the spare VM process ---------------------------------------------------------------------------------

    def _make_spare(self) -> None:
        """A process for the next VM, whoever's it will be, as most are: on this machine, with the daemon's own engine."""
        self._spare_is_due = False
        if self._spare is not None or self._retired:
            return
        translator = self._translator.path if self._options.accel == TRANSLATOR else ""
        order = VmOrder(
            session="", pid=0, uid=0, key="", name="", compat="", accel=self._options.accel, translator=translator,
            incarnation=self._incarnation, door=self._private.name("d"), router=self._private.name("v"), spare=True,
        )  # fmt: skip
        ours, theirs = fd_passing.pair()
        with theirs:
            try:
                fd_passing.send(self._zygote, order.encode(), [theirs.fileno()])
            except OSError:
                ours.close()
                return
        self._spare = ours, order
        self._loop.add_reader(ours.fileno(), self._drop_spare)  # it says nothing: it has ended

    def _drop_spare(self) -> None:
        if self._spare is not None:
            (control, order), self._spare = self._spare, None
            self._loop.remove_reader(control.fileno())
            control.close()
            order.sweep()

    def _from_spare(self, order: VmOrder, ticket: Ticket) -> VmRecord | None:
        """The process that waits, if there is one and it is as ordered."""
        if self._spare is None or order.remote or order.together or order.accel != self._spare[1].accel:
            return None
        control, made = self._spare
        order = replace(order, door=made.door, router=made.router)
        owner = os.pidfd_open(order.pid)
        try:
            fd_passing.send(control, order.encode(), [owner], block=False)
        except OSError:
            self._drop_spare()
            return None
        finally:
            os.close(owner)
        self._spare = None
        self._loop.remove_reader(control.fileno())
        return VmRecord(ticket.session, control, order, ticket, was_spare=True)

    # -- VMs go on --------------------------------------------------------------------------------------------

    def _remote_order(self, session: ClientSession) -> dict[str, Any]:
        """What a VM of a session over tcp needs to listen for its owner."""
        remote = self._options.remote
        if not session.peer.key or remote is None:
            return {}
        pair = (remote.curve.public.decode(), remote.curve.secret.decode())
        return {"remote": f"tcp://{remote.host}:*", "server_key": pair}

    def _vm_says(self, vm: VmRecord) -> None:
        """A packet of a VM process: ready, attached; or its end."""
        try:
            data, fds = fd_passing.receive(vm.control, 512, block=False)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            log.info("VM process %d has ended", vm.pid)
            self._forget_vm(vm)
            return
        news = json.loads(data)
        if news.get("attached"):
            vm.attached = True
        elif vm.ticket is not None and len(fds) == 1:
            vm.pid, vm.pidfd = int(news["pid"]), fds[0]
            vm.attached = bool(vm.order.remote)  # then it looks after its owner's lease itself
            extra = {"door": vm.order.door, "router": news.get("router") or f"ipc://{vm.order.router}", "pid": vm.pid}
            if "system" in news:
                extra["system"] = int(news["system"])
            ticket, vm.ticket = vm.ticket, None
            log.info("VM process %d %s for %s", vm.pid, vm.order.name, vm.session.peer)
            ticket.answer(int(news["handle"]), json.dumps(extra).encode())
            if vm.session.dead:
                self._forget_vm(vm)
            return
        fd_passing.close_all(fds)

    def _forget_vm(self, vm: VmRecord) -> None:
        """The process has ended, or shall: closing its control socket ends it."""
        if vm not in self._vms:
            return
        self._vms.discard(vm)
        self._loop.remove_reader(vm.control.fileno())
        vm.control.close()
        if vm.pidfd >= 0:
            os.close(vm.pidfd)
        vm.order.sweep()  # the zygote does so too; but it may have been killed
        if vm.ticket is not None:
            ticket, vm.ticket = vm.ticket, None
            if vm.was_spare and not vm.session.dead:
                with suppress(OSError):  # it was killed while it waited: that is not the client's affair
                    order = replace(vm.order, door=self._private.name("d"), router=self._private.name("v"))
                    self._expect(self._from_zygote(order, ticket))
                    return
            ticket.fail(EIO, b"the VM process did not start, see kvmcore's log")
        self._note_idle()

    # -- the zygote, and the end ------------------------------------------------------------------------------

    def _zygote_is_gone(self) -> None:
        """It was killed, and its VMs with it. A new one, by exec: this process has a Context."""
        log.error("the zygote has died; starting another one")
        self._loop.remove_reader(self._zygote.fileno())
        self._zygote.close()
        self._zygote, theirs = fd_passing.pair()
        command = [
            sys.executable, "-m", "kvmcore.server.zygote", str(theirs.fileno()), str(self._private.path), self._options.path
        ]  # fmt: skip
        os.set_inheritable(self._private.fd, True)
        subprocess.Popen(
            command,
            pass_fds=[theirs.fileno(), self._private.fd],
            stdin=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
        )
        theirs.close()
        self._loop.add_reader(self._zygote.fileno(), self._zygote_is_gone)

    def _retire(self) -> None:
        """Make way for another daemon at this path; end when nobody needs us any more."""
        log.info("retired")
        self._acceptor.shut()
        self._retired = True
        self._drop_spare()

    def _note_idle(self) -> None:
        """Start counting idle time if there is no session and no VM."""
        self._idle_since += 1
        if (self._options.idle_timeout > 0 or self._retired) and not self._sessions and not self._vms:
            mark, latest = self._idle_since, time.monotonic() + _IDLE_WORK_AT_MOST
            timeout = 0.0 if self._retired else self._options.idle_timeout
            self._loop.call_later(timeout, lambda: self._stop_if_idle(mark, latest))

    def _stop_if_idle(self, mark: int, latest: float) -> None:
        if mark != self._idle_since or self._sessions or self._vms:
            return
        reachable = not self._retired and os.path.exists(self._options.path)
        if self._translator.waiting and reachable and time.monotonic() < latest:
            # what VMs have left to translate is for the next ones
            self._loop.call_later(_IDLE_WORK_SECONDS, lambda: self._stop_if_idle(mark, latest))
            return
        log.info("idle for %g s: done", self._options.idle_timeout)
        self._loop.stop()
