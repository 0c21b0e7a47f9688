"""A machine as others see it running: registered by name, with its QMP socket and console socket.

What `python -m qemu_user` and `softkvm run` start. Same verbs as Machine; nothing of it is left behind when
wait() has returned, and after a kill -9 the registry clears the rest.
"""

from __future__ import annotations

import os
import signal

from qemu_user.backends.errors import BackendError
from qemu_user.config.machine_config import MachineConfig
from qemu_user.machine.machine import Machine, StartError
from qemu_user.management.qmp_server import QmpServer
from qemu_user.management.registry import NameTaken, Registration


class Instance:
    """start(), wait(); the rest may be called from any thread and from signal handlers."""

    def __init__(self, config: MachineConfig, endpoint: str) -> None:
        """StartError if the name is taken."""
        try:
            self._registration = Registration(config.name)
        except (NameTaken, OSError) as error:
            raise StartError(str(error)) from error
        directory = self._registration.directory
        self.config = config
        self.machine = Machine(config, endpoint, str(directory / "console.sock"))
        self._control = str(directory / "control.sock")
        self._qmp: QmpServer | None = None

    @property
    def directory(self) -> str:
        """Where control.sock and console.sock are."""
        return str(self._registration.directory)

    def start(self, arriving: bool = False) -> None:
        """StartError, with nothing left behind. `arriving`: as Machine.start() has it."""
        try:
            paths = [self._control, *(qmp.path for qmp in self.config.qmp)]
            self._qmp = QmpServer(self.machine, paths)
            self.machine.start(arriving)
            self._qmp.start()
            self._registration.describe(
                vm_pid=self.machine.vm.pid,
                memory=self.config.memory,
                cpus=self.config.cpus,
                kernel=os.path.basename(self.config.boot.kernel),
            )
        except BackendError as error:
            self._close()
            raise StartError(str(error)) from error
        except BaseException:
            self._close()
            raise

    def wait(self) -> int:
        """The VM's exit status, when it has ended (Machine.wait)."""
        try:
            return self.machine.wait()
        finally:
            self._close()

    def request_powerdown(self) -> bool:
        """Ask the guest to shut down; False if it has nobody who listens."""
        return self.machine.request_powerdown()

    def quit(self, status: int = 0) -> None:
        """End the VM now."""
        self.machine.quit(status)

    request_stop = quit

    def kill(self) -> None:
        """End it without its cooperation: the kvmcore process of the VM is killed, wait() returns 1."""
        try:
            os.kill(self.machine.vm.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def _close(self) -> None:
        self.machine.close()
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        self._registration.close()
