"""A running switch: its ports, sockets, captures and control, on one I/O loop. What `softkvm switch run` starts.

In <runtime>/switches/NAME: port.sock for VMs of ours, qemu.sock for QEMU (`-netdev stream`), control.sock for `softkvm switch`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from protocol.channel import keys, zmq_socket
from protocol.channel.zmq_socket import Curve
from protocol.codec import switch_hello
from protocol.codec.switch_hello import Hello, Welcome
from qemu_user.backends.errors import BackendError
from qemu_user.backends.io_loop import IoLoop
from qemu_user.config.errors import ConfigError
from qemu_user.management.registry import NameTaken, Registration
from qemu_user.switch.capture import FLUSH_SECONDS, Capture
from qemu_user.switch.control import Control, ControlError
from qemu_user.switch.dgram_port import DgramPort
from qemu_user.switch.forwarding import Forwarding
from qemu_user.switch.link import Callers, Dialled, LinkHello, LinkPort
from qemu_user.switch.mac_table import MacTable
from qemu_user.switch.plan import PortPlan, SwitchPlan, is_port_name
from qemu_user.switch.port import Port
from qemu_user.switch.settings import settings_from
from qemu_user.switch.sockets import RECONNECT_SECONDS, Caller, Greeter, Listener
from qemu_user.switch.stream_port import StreamPort
from qemu_user.switch.tap_port import TapPort

MAX_PORTS = 256
KIND = "switches"


class SwitchError(Exception):
    """It cannot be; the text is for the user."""


class Switch:
    """start(), run() until stop(), close()."""

    def __init__(self, plan: SwitchPlan, log: Callable[[str], None]) -> None:
        self.plan, self.log = plan, log
        self.loop = IoLoop(self._failed)
        self.forwarding = Forwarding(MacTable(plan.limit, plan.ageing), plan.transit)
        self._plans = {port.name: port for port in plan.ports}
        self._callers: dict[str, Caller] = {}
        self._captures: list[Capture] = []
        self._flushing = False
        self._closing: list[Any] = []
        self._id = uuid.uuid4().hex
        self._hello = msgspec.json.encode(LinkHello(switch=self._id, name=plan.name))
        self._began = time.time()
        self._authenticator: Any = None
        taken = f"a switch named {plan.name} is running; choose another name, or see `softkvm switch show`"
        try:
            self._registration = Registration(plan.name, KIND, taken)
        except (NameTaken, OSError) as error:
            raise SwitchError(str(error)) from error
        self.directory = self._registration.directory

    def _failed(self, error: BaseException) -> None:
        self.log("".join(traceback.format_exception(error)))

    # -- life --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open everything. SwitchError, with nothing left behind."""
        try:
            greeter = Greeter(self.loop, self._greeted)
            self._closing += [
                Listener(str(self.directory / "port.sock"), self.loop, greeter.accept),
                Listener(str(self.directory / "qemu.sock"), self.loop, self._plain("qemu")),
            ]
            for plan in self.plan.ports:
                self._open(plan)
            self._open_links()
            commands = {
                "show": self._show, "set": self._set, "unplug": self._unplug, "capture": self._capture,
                "capture-stop": self._capture_stop, "stop": self._stop,
            }  # fmt: skip
            self._closing.append(Control(str(self.directory / "control.sock"), self.loop, commands))
            self._registration.describe()
        except (BackendError, keys.KeyFileError, zmq.ZMQError, ValueError, OSError) as error:
            self.close()
            raise SwitchError(str(error)) from error
        self.loop.call_later(1.0, self._age)

    def run(self) -> None:
        """Serve until stop()."""
        self.loop.run()

    def stop(self) -> None:
        """Any thread, signal handlers too."""
        self.loop.stop()

    def close(self) -> None:
        """Give everything back. Idempotent."""
        for port in tuple(self.forwarding.ports.values()):
            port.close()
        for thing in self._closing:
            thing.close()
        self._closing.clear()
        for capture in self._captures:
            capture.file.close()
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        self._registration.close()

    def _age(self) -> None:
        self.forwarding.table.age(time.monotonic())
        self.loop.call_later(max(0.2, min(10.0, self.plan.ageing / 10)), self._age)

    # -- ports -------------------------------------------------------------------------------------

    def _add(self, port: Port) -> None:
        self.forwarding.add(port)
        port.captures = [capture for capture in self._captures if capture.wants(port)]
        if not isinstance(port, LinkPort):
            port.gone = self._gone

    def _gone(self, port: Port) -> None:
        self.forwarding.remove(port)
        plan = self._plans.get(port.name)
        if plan is not None and plan.connect:
            self.loop.call_later(RECONNECT_SECONDS, lambda: self._call(plan))

    def _free(self, name: str) -> str:
        taken = {port.name for port in self.forwarding.ports.values()}
        return next(each for each in (name, *(f"{name}#{count}" for count in range(2, MAX_PORTS + 2))) if each not in taken)

    def _open(self, plan: PortPlan) -> None:
        port: Port
        if plan.tap:
            port = TapPort(plan.name, plan.settings, self.loop, plan.tap)
        elif plan.local:
            port = DgramPort(plan.name, plan.settings, self.loop, plan.local, plan.remote)
        elif plan.listen:
            self._closing.append(Listener(plan.listen, self.loop, self._plain(plan.name, plan)))
            return
        elif plan.connect:
            self._call(plan)
            return
        else:
            return  # a place for a VM
        self._add(port)
        port.start()

    def _call(self, plan: PortPlan) -> None:
        if plan.name not in self._callers:
            self._callers[plan.name] = Caller(plan.connect, self.loop, self._plain(plan.name, plan))
            self._closing.append(self._callers[plan.name])
        self._callers[plan.name].call()

    def _plain(self, name: str, plan: PortPlan | None = None) -> Callable[[socket.socket], None]:
        """Makes a port of a connection that carries plain frames. A port of the plan has one peer at a time."""

        def plug(sock: socket.socket) -> None:
            full = len(self.forwarding.ports) >= MAX_PORTS
            if full or (plan is not None and any(port.name == name for port in self.forwarding.ports.values())):
                sock.close()
                return
            settings = plan.settings if plan is not None else self.plan.default
            port = StreamPort(self._free(name), settings, self.loop, sock, False, _who(sock))
            self._add(port)
            port.start()

        return plug

    def _greeted(self, sock: socket.socket, hello: Hello) -> Welcome:
        if not is_port_name(hello.name) or "#" in hello.name:
            return Welcome(error=f"{hello.name!r} is no name for a port")
        if len(self.forwarding.ports) >= MAX_PORTS:
            return Welcome(error=f"it has {MAX_PORTS} ports, all in use")
        plan = self._plans.get(hello.name) or self._plans.get(hello.name.partition("/")[0])
        try:
            settings = settings_from(hello.settings, self.plan.default)
        except ConfigError as error:
            return Welcome(error=str(error))
        if plan is not None:
            if plan.tap or plan.listen or plan.connect or plan.local:
                return Welcome(error=f"its port {plan.name} is not for VMs")
            if hello.settings and settings != plan.settings:
                return Welcome(error=f"it has settings of its own for port {plan.name} ({plan.settings.describe()})")
            settings = plan.settings
        port = StreamPort(self._free(hello.name), settings, self.loop, sock, True, _who(sock))
        port.kind = "vm"
        welcome = Welcome(port=port.name)
        with contextlib.suppress(OSError):  # who has hung up is noticed as any other
            sock.send(switch_hello.pack(welcome))
        self._add(port)
        port.start()
        return welcome

    # -- links -------------------------------------------------------------------------------------

    def _known(self, switch: str, port: Port) -> bool:
        others = (other for other in self.forwarding.ports.values() if isinstance(other, LinkPort) and other is not port)
        return switch == self._id or any(other.switch == switch and other.is_up for other in others)

    def _open_links(self) -> None:
        plan = self.plan
        own: Curve | None = None
        if any(uri.startswith("tcp://") for uri in (plan.listen, *(link.uri for link in plan.links))):
            own = keys.own(Path(plan.key) if plan.key else None)
        for link in plan.links:
            key = None
            host = link.uri.partition("://")[2].rpartition(":")[0]
            if own is not None and link.uri.startswith("tcp://"):
                file = Path(link.peer_key) if link.peer_key else keys.folder() / "peers" / f"{host}.key"
                key = Curve(own.public, own.secret, keys.public(file))
            name = self._free(f"link-{host or os.path.basename(link.uri)}")
            dialled = Dialled(link.uri, key, name, link.settings, self.loop, self._known, self._hello)
            self._closing.append(dialled)
            self._add(dialled.port)
        if plan.listen:
            self._listen_for_links(own)

    def _listen_for_links(self, own: Curve | None) -> None:
        names: dict[str, str] = {}
        context = zmq_socket.context()
        if self.plan.listen.startswith("tcp://"):
            from qemu_user.migration.host import authenticated

            trusted = keys.trusted(Path(self.plan.peers) if self.plan.peers else None)
            if not trusted:
                raise SwitchError(
                    f"--listen {self.plan.listen}: no switch could call: put the others' public keys (softkvm host keys) "
                    f"into {self.plan.peers or keys.folder() / 'peers'}"
                )
            names = {key.decode(): name for name, key in trusted.items()}
            context, self._authenticator = authenticated(list(trusted.values()))
        router = zmq_socket.router(context, self.plan.listen, own)
        callers = Callers(
            router, names, self.plan.link_settings, self.loop, self._known, self._hello,
            self._add_caller, self.forwarding.remove,
        )  # fmt: skip
        self.listen = callers.listen
        self._closing.append(callers)

    def _add_caller(self, port: Port) -> None:
        port.name = self._free(port.name)
        self._add(port)

    # -- commands ----------------------------------------------------------------------------------

    def _show(self, arguments: dict[str, Any]) -> dict[str, Any]:
        table = self.forwarding.table
        ports = [
            {
                "name": port.name, "kind": port.kind, "peer": port.peer, "up": port.is_up, "settings": port.settings.describe(),
                "virtio_header": port.header, "addresses": table.count(port.number), "queued_bytes": port.queued_bytes,
                **port.counters(),
            }
            for port in self.forwarding.ports.values()
        ]  # fmt: skip
        found = {
            "name": self.plan.name, "pid": os.getpid(), "seconds": time.time() - self._began, "directory": str(self.directory),
            "listen": getattr(self, "listen", ""), "ports": ports, "addresses": len(table), "address_limit": table.limit,
            "moves": table.moves, "evicted": table.evicted, "flooded": self.forwarding.flooded,
            "captures": [
                {"file": each.file.path, "ports": each.ports, "frames": each.file.frames, "dropped": each.file.dropped}
                for each in self._captures
            ],
        }  # fmt: skip
        if arguments.get("table"):
            now = time.monotonic()
            names = {port.number: port.name for port in self.forwarding.ports.values()}
            found["table"] = [
                {"vlan": each.vlan, "mac": each.mac.hex(":"), "port": names.get(each.port, ""), "age": now - each.seen}
                for each in table
            ]
        return found

    def _port(self, arguments: dict[str, Any]) -> Port:
        name = arguments.get("port")
        for port in self.forwarding.ports.values():
            if port.name == name:
                return port
        raise ControlError(f"no port {name!r}; softkvm switch show {self.plan.name} lists them")

    def _set(self, arguments: dict[str, Any]) -> str:
        """New settings for a port, until who is plugged in goes; for a place of the plan for good."""
        name, text = str(arguments.get("port")), str(arguments.get("settings", ""))
        plan = self._plans.get(name)
        ports = [port for port in self.forwarding.ports.values() if port.name == name]
        if not ports and plan is None:
            self._port(arguments)
        base = ports[0].settings if ports else plan.settings if plan else self.plan.default
        try:
            settings = settings_from(text, base)
        except ConfigError as error:
            raise ControlError(str(error)) from error
        if plan is not None:
            self._plans[name] = msgspec.structs.replace(plan, settings=settings)
        for port in ports:
            port.configure(settings)
            self.forwarding.configure(port)
        return settings.describe()

    def _unplug(self, arguments: dict[str, Any]) -> dict[str, Any]:
        port = self._port(arguments)
        if isinstance(port, LinkPort):
            raise ControlError(f"port {port.name} is a link; end it at the side that called")
        port.close()
        port.gone(port)
        return {}

    def _capture(self, arguments: dict[str, Any]) -> dict[str, Any]:
        path, ports = str(arguments.get("file", "")), [str(name) for name in arguments.get("ports") or []]
        if any(each.file.path == path for each in self._captures):
            raise ControlError(f"{path} is being written already")
        for name in ports:
            if name not in self._plans:
                self._port({"port": name})
        try:
            self.add_capture(Capture(path, ports))
        except BackendError as error:
            raise ControlError(str(error)) from error
        return {}

    def add_capture(self, capture: Capture) -> None:
        """Record from now on."""
        capture.file.warn = self.log
        self._captures.append(capture)
        self._spread_captures()
        if not self._flushing:
            self._flush_captures()

    def _capture_stop(self, arguments: dict[str, Any]) -> dict[str, Any]:
        path = str(arguments.get("file", ""))
        found = [each for each in self._captures if each.file.path == path]
        if not found:
            raise ControlError(f"nothing is recorded to {path}")
        self._captures.remove(found[0])
        self._spread_captures()
        found[0].file.close()
        return {"frames": found[0].file.frames, "dropped": found[0].file.dropped}

    def _spread_captures(self) -> None:
        for port in self.forwarding.ports.values():
            port.captures = [capture for capture in self._captures if capture.wants(port)]

    def _flush_captures(self) -> None:
        for capture in self._captures:
            capture.file.flush()
        self._flushing = bool(self._captures)
        if self._flushing:
            self.loop.call_later(FLUSH_SECONDS, self._flush_captures)

    def _stop(self, arguments: dict[str, Any]) -> dict[str, Any]:
        self.loop.call_later(0.01, self.stop)  # the answer goes first
        return {}


def _who(sock: socket.socket) -> str:
    """The process at the other end of a Unix socket."""
    from protocol.channel.fd_passing import credentials

    try:
        return f"pid {credentials(sock).pid}"
    except OSError:
        return ""


def socket_of(name: str, which: str = "port.sock") -> str:
    """The path of a switch's socket, whether it runs or not."""
    from qemu_user.management.registry import runtime_directory

    return str(runtime_directory() / KIND / name / which)


