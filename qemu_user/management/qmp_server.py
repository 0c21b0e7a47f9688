"""The QMP server: what control.sock and -qmp sockets speak (QEMU's docs/interop/qmp-spec.rst).

A thread of its own per VM, so that a command that waits for vCPUs holds up no device. Each connection starts
with the greeting and needs qmp_capabilities first. Events go to everybody who has done so. A bad client costs
only itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import traceback
from functools import partial
from typing import Any

import msgspec

from protocol.codec.qmp import QmpReader, QmpSyntaxError, encode
from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.unix_address import listen_unix
from qemu_user.machine.machine import Machine
from qemu_user.management.commands import commands
from qemu_user.management.commands.command import CommandError
from qemu_user.management.commands.query_version import VERSION

MAX_CLIENTS = 32
MAX_UNSENT = 1 << 20
"""Bytes that wait for a client; one that does not read is dropped."""


class Client:
    """One connection."""

    def __init__(self, server: QmpServer, sock: socket.socket) -> None:
        self._server, self._socket = server, sock
        self._reader = QmpReader()
        self._unsent = b""
        self.negotiated = False
        sock.setblocking(False)

    def greet(self) -> None:
        self.send({"QMP": {"version": VERSION, "capabilities": []}})

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """QMP thread: queue and write what goes."""
        self._unsent += encode(message)
        self.flush()

    def flush(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            if len(self._unsent) > MAX_UNSENT:
                self._server.drop(self)
            else:
                self._server.loop.add_writer(self.fileno(), self.flush)
            return
        except OSError:
            self._server.drop(self)
            return
        self._server.loop.remove_writer(self.fileno())

    def readable(self) -> None:
        try:
            data = self._socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._server.drop(self)
            return
        for message in self._reader.feed(data):
            if isinstance(message, QmpSyntaxError):
                self.send({"error": {"class": "GenericError", "desc": str(message)}})
            else:
                self.send(self._answer(message))

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        identity = {"id": message["id"]} if "id" in message else {}
        try:
            return {"return": self._execute(message), **identity}
        except CommandError as error:
            return {"error": {"class": error.kind, "desc": str(error)}, **identity}
        except Exception as error:
            self._server.machine.warn(f"internal error in a QMP command: {error!r}\n{traceback.format_exc()}")
            return {"error": {"class": "GenericError", "desc": f"internal error: {error!r}"}, **identity}

    def _execute(self, message: dict[str, Any]) -> Any:
        name, arguments = message.get("execute"), message.get("arguments", {})
        unknown = set(message) - {"execute", "arguments", "id"}
        if unknown:
            raise CommandError(f"QMP input member '{sorted(unknown)[0]}' is unexpected")
        if not isinstance(name, str):
            raise CommandError("QMP input lacks member 'execute'")
        if not isinstance(arguments, dict):
            raise CommandError("QMP input member 'arguments' must be an object")
        if not self.negotiated:
            if name != "qmp_capabilities":
                raise CommandError(
                    f"Expecting capabilities negotiation with 'qmp_capabilities' before '{name}'",
                    "CommandNotFound",
                )
            if arguments.get("enable"):
                raise CommandError("capabilities: none is offered")
            self.negotiated = True
            return {}
        if name == "query-commands":
            return [{"name": known} for known in sorted({*commands(), "query-commands", "qmp_capabilities"})]
        return self._server.run_command(name, arguments)

    def close(self) -> None:
        self._server.loop.remove(self.fileno())
        self._socket.close()


class QmpServer:
    """Listens on `paths`. start() after the sockets may be there, close() before the machine's process
    ends.
    """

    def __init__(self, machine: Machine, paths: list[str]) -> None:
        """BackendError if a socket cannot be bound."""
        self.machine = machine
        self.loop = IoLoop(self._failed)
        self._clients: list[Client] = []
        self._paths = paths
        self._listeners = [listen_unix(path, "QMP socket") for path in paths]
        for listener in self._listeners:
            listener.setblocking(False)
            self.loop.add_reader(listener.fileno(), partial(self._accept, listener))
        self._thread = threading.Thread(target=self.loop.run, name="qmp", daemon=True)
        machine.listeners.append(self._event)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        if len(self._clients) >= MAX_CLIENTS:
            sock.close()
            return
        client = Client(self, sock)
        self._clients.append(client)
        self.loop.add_reader(client.fileno(), client.readable)
        client.greet()

    def drop(self, client: Client) -> None:
        """A connection is over."""
        if client in self._clients:
            self._clients.remove(client)
            client.close()

    def run_command(self, name: str, arguments: dict[str, Any]) -> Any:
        """The result of a command, as JSON's types. CommandError."""
        command = commands().get(name)
        if command is None:
            raise CommandError(f"The command {name} has not been found", "CommandNotFound")
        if command.states and self.machine.status not in command.states:
            raise CommandError(
                f"{name}: the VM is {self.machine.status}; allowed when {', '.join(command.states)}"
            )
        try:
            given = msgspec.convert(arguments, command.arguments)
        except msgspec.ValidationError as error:
            raise CommandError(f"{name}: {error}") from error
        return msgspec.to_builtins(command.run(self.machine, given))

    def _event(self, event: str, data: dict[str, Any]) -> None:
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        message: dict[str, Any] = {
            "event": event,
            "timestamp": {"seconds": seconds, "microseconds": nanoseconds // 1000},
        }
        if data:
            message["data"] = data
        self.loop.call_soon(lambda: self._broadcast(message))

    def _broadcast(self, message: dict[str, Any]) -> None:
        for client in tuple(self._clients):
            if client.negotiated:
                client.send(message)

    def _failed(self, error: BaseException) -> None:
        self.machine.warn("internal error in the QMP thread: " + "".join(traceback.format_exception(error)))

    def close(self) -> None:
        """Stop answering; the sockets go."""
        if self._thread.is_alive():
            done = threading.Event()
            self.loop.call_soon(done.set)  # events sent before are out by then
            done.wait(1.0)
            self.loop.stop()
            self._thread.join(5.0)
        for client in tuple(self._clients):
            self.drop(client)
        for listener, path in zip(self._listeners, self._paths, strict=True):
            self.loop.remove(listener.fileno())
            listener.close()
            with contextlib.suppress(OSError):
                os.unlink(path)
        self._listeners, self._paths = [], []
        self.loop.close()
