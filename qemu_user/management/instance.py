"""A machine as others see it running: registered by name, with its QMP socket and console socket.

What `python -m qemu_user` and `softkvm run` start. Same verbs as Machine; nothing of it is left behind when
wait() has returned, and after a kill -9 the registry clears the rest.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.abi.errors import KvmError
from qemu_user.backends.chardev import console_log
from qemu_user.backends.errors import BackendError
from qemu_user.config.background import for_background
from qemu_user.config.machine_config import MachineConfig
from qemu_user.devices.device import StateError
from qemu_user.machine.machine import Machine, StartError
from qemu_user.management.qmp_server import QmpServer
from qemu_user.management.registry import ATTACH_FILE, NameTaken, Registration, logs_folder

if TYPE_CHECKING:
    from protocol.client import Vm
    from qemu_user.devices.absent import PageSource
    from qemu_user.machine.keeper import Predecessor
    from qemu_user.machine.made import MadeVm


_DEAD_SECONDS = 2.0


class Instance:
    """start(), wait(); the rest may be called from any thread and from signal handlers."""

    def __init__(
        self, config: MachineConfig, endpoint: str, provisional: bool = False, registration: Registration | None = None
    ) -> None:
        """StartError if the name is taken. `provisional`: under another name, until take_name(). `registration`: it is there
        already."""
        name = f"{config.name[:40]}.incoming-{os.getpid()}" if provisional else config.name
        try:
            self._registration = Registration(name) if registration is None else registration
        except (NameTaken, OSError) as error:
            raise StartError(str(error)) from error
        directory = self._registration.directory
        self.config = config
        log = console_log.path_of(logs_folder(), config.name)
        self.machine = Machine(config, endpoint, str(directory / "console.sock"), str(log))
        self._control = str(directory / "control.sock")
        self.machine.introduce = self._introduce
        self._qmp: QmpServer | None = None

    @property
    def directory(self) -> str:
        """Where control.sock and console.sock are."""
        return str(self._registration.directory)

    def start(
        self, arriving: bool = False, lock_disks: bool = True, ram_fd: int = -1, predecessor: Predecessor | None = None,
        made: MadeVm | None = None,
    ) -> None:  # fmt: skip
        """StartError, with nothing left behind. The arguments are Machine.start()'s."""
        try:
            if not arriving and predecessor is None:  # who goes on with a VM goes on with its log
                running = frozenset(path.name for path in self._registration.directory.parent.iterdir())
                console_log.begin(logs_folder(), self.config.name, running)
            paths = [self._control, *(qmp.path for qmp in self.config.qmp)]
            self._qmp = QmpServer(self.machine, paths)
            self.machine.start(arriving, lock_disks, ram_fd, predecessor, made)
            self._qmp.start()
            self._registration.describe(
                vm_pid=self.machine.vm.pid,
                memory=self.config.memory,
                cpus=self.config.cpus,
                kernel=os.path.basename(self.config.boot.kernel),
                login=self.config.login,
            )
        except BackendError as error:
            self._close(predecessor is not None)
            raise StartError(str(error)) from error
        except BaseException:
            self._close(predecessor is not None)
            raise

    def wait(self) -> int:
        """The VM's exit status, when it has ended (Machine.wait)."""
        try:
            return self.machine.wait()
        finally:
            self._close()

    def take_name(self, name: str, seconds: float = 30.0) -> None:
        """Be registered under `name`, as soon as the process that had it is gone; at once if nobody has."""

        def take() -> None:
            end = time.monotonic() + seconds
            while not self._registration.rename(name):
                if time.monotonic() > end:
                    self.machine.warn(f"is listed as {self._registration.name}: {name} is taken")
                    return
                time.sleep(0.01)

        threading.Thread(target=take, name="take-name", daemon=True).start()

    def _introduce(self) -> None:
        from qemu_user.machine.keeper import introduce

        introduce(self.machine, self._registration.directory / ATTACH_FILE, self._registration.descriptor)

    def abandon(self) -> None:
        """It was built in vain: give everything back."""
        self._close()

    @classmethod
    def reached(cls, directory: Path) -> Vm:
        """The VM of that directory, whose device process has died; we are its client from now on. StartError: there is nothing
        to attach to, or it has a device process."""
        from qemu_user.machine.keeper import reach

        end = time.monotonic() + _DEAD_SECONDS
        try:
            while True:
                try:
                    return reach(directory / ATTACH_FILE)
                except KvmError as error:
                    if error.errno != errno.EBUSY or time.monotonic() > end:
                        raise
                    time.sleep(0.01)  # it has died just now, and kvmcore has not heard of it yet
        except FileNotFoundError as error:
            raise StartError(f"VM {directory.name}: was not started with --keep: there is nothing to attach to") from error
        except (KvmError, OSError) as error:
            reason = "has its device process" if getattr(error, "errno", 0) == errno.EBUSY else str(error)
            raise StartError(f"VM {directory.name}: {reason}") from error

    @classmethod
    def remaining(cls, directory: Path, vm: Vm, registration: int, config: MachineConfig, ram_fd: int) -> Instance:
        """What is left in that directory of a VM that lives on elsewhere (Machine.remain), listed and reached as VMs are."""
        instance = cls(config, "", registration=Registration.adopted(directory, registration))
        try:
            instance._qmp = QmpServer(instance.machine, [instance._control])
        except BackendError as error:
            vm.leave()
            instance._close(waits=True)
            raise StartError(str(error)) from error
        instance.machine.remain(vm, ram_fd)
        instance._qmp.start()
        instance._registration.describe(vm_pid=vm.pid, memory=config.memory, cpus=config.cpus, kernel="")
        return instance

    @classmethod
    def attached(
        cls, directory: Path, vm: Vm, source_of: Callable[[bytes, list[int]], PageSource], ours: Callable[[str, int], bool]
    ) -> Instance:
        """That `vm` of reached(), with this process in the place of the one that has died; it goes on. `source_of`:
        Predecessor's; `ours`: whether the VM of that uuid and generation may run here, else it ends. StartError: it may not, or
        cannot; KvmError, StateError."""
        from qemu_user.machine.keeper import Predecessor

        try:
            predecessor = Predecessor(vm, source_of)
        except (KvmError, StateError) as error:
            raise StartError(f"VM {directory.name}: {error}") from error
        registration = Registration.adopted(directory, predecessor.registration)
        config = predecessor.config()
        if not ours(config.uuid, predecessor.machine.generation):
            predecessor.vm.close()
            registration.close()
            raise StartError(f"VM {directory.name}: has gone on at another host; what was left of it here has been ended")
        instance = cls(for_background(config, config.name), "", registration=registration)
        instance.start(predecessor=predecessor)
        if directory.name != config.name:  # it had just come, and its name was another process's yet
            instance.take_name(config.name)
        return instance

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

    def _close(self, waits: bool = False) -> None:
        """`waits`: the VM could not be taken up, and waits for another process."""
        self.machine.close()
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        if waits:
            self._registration.leave()
        else:
            self._registration.close()
