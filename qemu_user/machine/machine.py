"""A VM: built from a configuration, started, stopped, reset, ended. One per process (nothing here is global).

Used by management/instance.py, which adds the registry and the QMP socket. Lifecycle calls may come from any
thread; what the guest asks for (reset, power-off) is carried out by wait(), on the caller's thread. No part
of it outlives close().
"""

from __future__ import annotations

import gc
import mmap
import os
import queue
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from errno import EINTR
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from protocol.abi.errors import KvmError
from protocol.abi.run_page import IMMEDIATE_EXIT
from protocol.abi.structs import MEM_GUEST_MEMFD, MEM_LOG_DIRTY_PAGES, MEM_USERFAULT
from protocol.channel import fd_passing
from qemu_user.backends.errors import BackendError
from qemu_user.backends.io_threads import IoThreads
from qemu_user.config.machine_config import MachineConfig
from qemu_user.devices.absent import AbsentPages, PageLost
from qemu_user.devices.device import Counters, Device, StateError
from qemu_user.devices.memory import GuestMemory
from qemu_user.exits.context import ExitContext
from qemu_user.machine import boot, large_pages, virt
from qemu_user.machine.build import Parts
from qemu_user.machine.cpu import Isa, read_isa, reset_state, set_boot_state
from qemu_user.machine.fdt import flatten
from qemu_user.machine.irq import AiaInterrupts, PlicInterrupts
from qemu_user.machine.kicks import Kicks
from qemu_user.machine.made import RAM_SEGMENT, MadeVm, make_vm
from qemu_user.machine.tree import machine_tree
from qemu_user.run_loop import PAUSE, QUIT, Gate, VcpuThread

if TYPE_CHECKING:
    from protocol.client import Vm
    from qemu_user.backends.block.raw import BlockBackend
    from qemu_user.machine.flash import FlashMemory
    from qemu_user.machine.keeper import Keeper, Predecessor

PRELAUNCH, RUNNING, PAUSED, SHUTDOWN = "prelaunch", "running", "paused", "shutdown"
INTERNAL_ERROR, ENDED = "internal-error", "ended"
INMIGRATE, POSTMIGRATE = "inmigrate", "postmigrate"
RAM_SLOT = 0
_BITMAP_SEGMENT = 1 << 40
"""Where the bitmap of absent pages lies in the address space of our session with kvmcore."""
_SWITCH_SECONDS = 0.0005
"""How long a thread that computes may keep the others, which mostly have some microseconds to do, from running."""
STOP_SECONDS = 10.0
_LOCK_SECONDS = 5.0
DRAIN_SECONDS = 30.0
_POWER_PORT = "org.softkvm.control"


class StartError(Exception):
    """The VM cannot be started; the text is for the user."""


class Happening(NamedTuple):
    """What wait() is to deal with."""

    what: str
    status: int = 0
    reason: str = ""


Listener = Callable[[str, dict[str, Any]], None]
"""(QMP event name, data)."""


class Machine:
    """`endpoint`: kvmcore's. `console_path`: where others may attach to the console hub ("": nowhere);
    `log_path`: where what it shows is kept."""

    def __init__(self, config: MachineConfig, endpoint: str, console_path: str = "", log_path: str = "") -> None:
        if not config.uuid:
            config = msgspec.structs.replace(config, uuid=str(uuid.uuid4()))
        self.config = config
        self.created = time.time()
        self.introduce: Callable[[], None] | None = None
        """Called when the VM has become one that outlives us."""
        self.keeper: Keeper | None = None
        self._predecessor: Predecessor | None = None
        self._becomes = PRELAUNCH
        """What it is to be when it has arrived."""
        self.generation = 0
        """How often the VM has moved to another process."""
        self.status = PRELAUNCH
        self.let_run = 0.0
        """time.monotonic() when resume() last opened the vCPUs' gate."""
        self.counters = Counters()
        self.listeners: list[Listener] = []
        self.failure = ""
        self._endpoint = endpoint
        self._power_asked = 0
        self._power_lock = threading.Lock()
        self._happenings: queue.SimpleQueue[Happening] = queue.SimpleQueue()
        self._life = threading.RLock()
        self._io = IoThreads(self._io_failed)
        self._loop = self._io.main
        self.parts = Parts(config, self._io, console_path, log_path)
        self._gate = Gate()
        self._kvm: Any = None
        self.vm: Any = None
        self.vm_made: Callable[[int], None] = lambda pid: None
        """Called with the VM's process before it has any memory."""
        self.vcpus: list[Any] = []
        self.threads: list[VcpuThread] = []
        self.memory = GuestMemory([])
        self._logging = False
        self.ram_fd = -1
        """RAM's memfd: that of a guest_memfd, or one that came from the process that ran this VM before."""
        self._memfd: Any = None
        self.flash: FlashMemory | None = None
        self.job: Any = None
        """The migration or snapshot that is under way, or was the last one (migration/job.py)."""
        self.interrupts: Any = None
        """The Interrupts (irq.py), once there is a VM."""
        self._kicks: Kicks | None = None
        self._isa: Isa | None = None
        self._made_aia: AiaInterrupts | None = None

    # -- start -------------------------------------------------------------------------------------

    def start(
        self, arriving: bool = False, lock_disks: bool = True, ram_fd: int = -1, predecessor: Predecessor | None = None,
        made: MadeVm | None = None,
    ) -> None:  # fmt: skip
        """Build the machine and let it run (unless `paused`). `arriving`: its memory and state come from elsewhere,
        so nothing is booted; it stands (INMIGRATE) until resume(). Not `lock_disks`: whoever still has them hands them
        over before that. `ram_fd`: the sealed memfd that is its memory, ours from now on. `predecessor`: the device process
        that ran it, and died. `made`: what kvmcore keeps, made before for this configuration. StartError, with nothing left
        behind.
        """
        self._predecessor = predecessor
        if made is not None:
            self._take(made)
        fd_passing.make_room()
        sys.setswitchinterval(_SWITCH_SECONDS)
        try:
            self.parts.open_backends(lock_disks and predecessor is None)
            self.parts.arriving = arriving or predecessor is not None
            self._create(ram_fd)
            if predecessor is not None:
                self._take_over(predecessor)
            elif arriving:
                self.status = INMIGRATE
            else:
                self._load()
            self.parts.start_backends(self.warn, self.quit, self._disk_news)
        except (BackendError, boot.BootError) as error:
            self.close()
            raise StartError(str(error)) from error
        except (KvmError, OSError) as error:
            self.close()
            raise StartError(f"kvmcore at {self._endpoint}: {error}") from error
        except (StateError, PageLost) as error:
            self.close()
            raise StartError(str(error)) from error
        except BaseException:
            self.close()
            raise
        self._loop.add_reader(self.vm.link.fileno(), self._look_at_kvmcore)
        self._io.start()
        for thread in self.threads:
            thread.start()
        gc.freeze()  # it stays until the end: collecting, and forks, need not look at it
        if predecessor is not None:
            self._go_on(predecessor)
        elif not arriving:
            if not self.config.paused:
                self.resume()
            else:
                self._begin_keeping()

    def remain(self, vm: Vm, ram_fd: int) -> None:
        """Instead of start(): the VM lives on elsewhere, and needs the rest of its memory, `ram_fd`, ours from now on. What
        kvmcore has of it, `vm`, ends with us."""
        self.vm, self.ram_fd, self.status = vm, ram_fd, POSTMIGRATE
        self.memory = GuestMemory([(virt.RAM_BASE, memoryview(mmap.mmap(ram_fd, self.config.memory)))])

    def _take_over(self, predecessor: Predecessor) -> None:
        """Devices and wires as a dead process has left them. StateError."""
        from qemu_user.machine.keeper import Keeper

        predecessor.restore(self)
        self.interrupts.settle()
        self.generation, self.created = predecessor.machine.generation, predecessor.handles.created
        self.status, self._becomes = INMIGRATE, predecessor.machine.status
        take = predecessor.locks()
        for image in self.parts.images:
            image.adopt_locks(take)
            self._lock_again(image)
        self.keeper = Keeper(self, predecessor)

    @staticmethod
    def _lock_again(image: BlockBackend) -> None:
        """The process that died may have been about to hand it over: who was to have it lets go soon. BackendError."""
        end = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                image.lock()
                return
            except BackendError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)

    def _go_on(self, predecessor: Predecessor) -> None:
        assert self.keeper is not None
        self._predecessor = None  # from here on the VM is ours, and ends with us if we end
        was = predecessor.machine.status
        if was == RUNNING:
            self.resume()
        else:
            self.status = was
            self.keeper.machine_changed()
        for what, status in self.keeper.power:
            self._power_asked += 1
            self._happenings.put(Happening(what, status))

    def _begin_keeping(self, *condition: Any) -> None:
        """From now on the VM outlives us, if it is to. `condition`: Vm.outlive()'s."""
        if self.config.keep and self.keeper is None:
            from qemu_user.machine.keeper import Keeper

            with self.standing() if self.status == RUNNING else nullcontext():
                self.keeper = Keeper(self)
                if self.introduce is not None:
                    self.introduce()
                self.vm.outlive(True, *condition)

    def _exit_done(self, cpu: int, device: Device | None) -> None:
        if self.keeper is not None:
            self.keeper.exit_done(cpu, device)

    def _create(self, ram_fd: int) -> None:
        """Everything that kvmcore keeps: memory, vCPUs, interrupt controller, eventfds."""
        config = self.config
        if self._predecessor is not None:
            aia = self._find(self._predecessor)
        else:
            if self.vm is None:
                self._take(make_vm(config, self._endpoint, ram_fd, self.vm_made))
            aia = self._made_aia
        vm = self.vm
        ram = memoryview(mmap.mmap(self.ram_fd, config.memory))
        self.memory = GuestMemory([(virt.RAM_BASE, ram)])
        if self._predecessor is not None:
            self.memory.absent = self._predecessor.absent(ram)
            with suppress(KvmError):  # it may have died with the dirty log on; what changes nothing is EINVAL
                self.log_dirty_pages(True)
        self.log_dirty_pages(False)
        if aia is not None:
            aia.finish(self.vcpus)
            self.interrupts = aia
        else:
            self.interrupts = PlicInterrupts(self.vcpus)
        self._kicks = Kicks(vm)
        self._io.poll_with(vm.link.vdso() if vm.link.local else None)
        if self.parts.flash:
            from qemu_user.machine.flash import FlashMemory

            kept = self._predecessor.bank if self._predecessor is not None else None
            self.flash = FlashMemory(vm, self.parts.flash, self.parts.arriving, kept)
        banks = self.flash.banks if self.flash is not None else []
        with self.wiring():
            self.parts.build(self.interrupts, self.memory, self._power, self._kicks, banks)
        self.interrupts.connect()
        if self.parts.balloon is not None:
            self.parts.balloon.changed = self._balloon_changed
        for index, vcpu in enumerate(self.vcpus):
            context = ExitContext(
                index,
                memoryview(vcpu.run_page).cast("B"),
                self.parts.bus,
                self.memory,
                self.parts.debug_console,
                self._power,
                self.fail,
                self.counters,
                self._exit_done if config.keep else None,
            )
            was_done = self._was_done if self._predecessor is not None else None
            self.threads.append(VcpuThread(vm, vcpu, context, self._gate, was_done))

    @contextmanager
    def wiring(self) -> Iterator[None]:
        """Doorbells that move inside are made known to kvmcore at the end, all at once. One thread, and no vCPU runs."""
        assert self._kicks is not None
        with self._kicks.at_once():
            yield

    def _was_done(self, cpu: int) -> bool:
        return self.keeper is not None and self.keeper.was_done(cpu)

    def _take(self, made: MadeVm) -> None:
        self._kvm, self.vm, self._made_aia = made.kvm, made.vm, made.aia
        self._memfd, self.ram_fd, self.vcpus = made.memfd, made.ram_fd, made.vcpus

    def _find(self, predecessor: Predecessor) -> AiaInterrupts | None:
        """The same of a VM that is there. Its vCPUs leave the guest: KVM_GET_ONE_REG would wait behind their KVM_RUN."""
        from protocol.client.vcpu import Vcpu
        from protocol.client.vm import GuestMemfd

        vm, handles = predecessor.vm, predecessor.handles
        self.vm = vm
        self.vcpus = [Vcpu(vm.link, vm.channel, number, index) for index, number in enumerate(handles.vcpus)]
        for vcpu in self.vcpus:
            vcpu.run_page[IMMEDIATE_EXIT] = 0
            vm.kick(vcpu)
        if handles.memory >= 0:
            self._memfd = GuestMemfd(vm.link, vm.channel, handles.memory, self.config.memory)
            self.ram_fd = self._memfd.fd
        else:
            self.ram_fd = predecessor.ram
        return AiaInterrupts(vm, handles.aia) if handles.aia >= 0 else None

    @property
    def memory_handle(self) -> int:
        """The number of RAM's guest_memfd; -1 if it is a memfd that came from elsewhere."""
        return self._memfd.number if self._memfd is not None else -1

    def _load(self) -> None:
        """Kernel, initrd and tree into memory, the boot hart at the entry. BootError."""
        config, memory = self.config, self.memory
        assert self.interrupts is not None
        if self._isa is None:  # a VM that comes from elsewhere needs it when it is reset
            self._isa = read_isa(self.vcpus[0], isinstance(self.interrupts, AiaInterrupts))
        if config.boot.kernel:
            span = boot.linux_span(config.boot.kernel)
            if span:
                large_pages.gather(self.ram_fd, (span, large_pages.filled_first(memory.size)))
            kernel = boot.load_kernel(config.boot.kernel, memory)
        else:  # as QEMU starts a KVM guest: in S-mode at the first instruction of the flash
            kernel = boot.Loaded(virt.PLACES["flash"].base, virt.RAM_BASE)
        nodes = [*self.interrupts.nodes(), *self.parts.nodes]

        def tree(initrd: tuple[int, int]) -> bytes:
            if config.boot.dtb:
                with open(config.boot.dtb, "rb") as file:
                    return file.read()
            return flatten(
                machine_tree(config.cpus, self._isa, config.memory, nodes, config.boot.append, initrd)  # type: ignore[arg-type]
            )

        at = boot.tree_address(memory, len(tree((1, 1))))
        if at < kernel.end:
            raise boot.BootError("the kernel and the device tree do not fit the memory; give more with -m")
        initrd = boot.load_initrd(config.boot, memory, kernel, at)
        memory.write(at, tree(initrd))
        set_boot_state(self.vcpus, kernel.entry, at)

    def log_dirty_pages(self, on: bool) -> None:
        """Switch kvmcore's dirty log of RAM. It starts empty."""
        self._logging = on
        self._set_ram_slot()

    def _set_ram_slot(self) -> None:
        flags = MEM_LOG_DIRTY_PAGES if self._logging else 0
        flags |= MEM_USERFAULT if self.memory.absent is not None else 0
        where = RAM_SEGMENT
        if self._memfd is not None:
            flags, where = flags | MEM_GUEST_MEMFD, 0
        self.vm.set_user_memory_region2(
            RAM_SLOT, virt.RAM_BASE, self.config.memory, where, flags, self._memfd, 0, _BITMAP_SEGMENT
        )

    def await_pages(self, absent: AbsentPages) -> None:
        """RAM whose pages come when they are touched. The machine has not run."""
        self.vm.map_segment(_BITMAP_SEGMENT, absent.bitmap_size, absent.fd)
        self.memory.absent = absent
        self._set_ram_slot()

    def rehearse(self) -> None:
        """What arrives is in place but for the last of it: have every vCPU do a KVM_RUN that ends before it begins, so that the
        one that the guest waits for finds its thread, its code and its tables in use. KvmError."""
        for vcpu in self.vcpus:
            vcpu.run_page[IMMEDIATE_EXIT] = 1
            try:
                vcpu.run()
            except KvmError as error:
                if error.errno != EINTR:
                    raise
            finally:
                vcpu.run_page[IMMEDIATE_EXIT] = 0

    def complete_memory(self, stop: threading.Event | None = None, pause: float = 0.0) -> bool:
        """Bring all pages that have yet to come; False if `stop` came first."""
        absent = self.memory.absent
        if absent is None:
            return True
        if not absent.fill(stop, pause):
            return False
        with self._life:
            if self.memory.absent is absent:
                self.memory.absent = None
                self._set_ram_slot()
                absent.close()
                if self.keeper is not None:
                    self.keeper.memory_came()
        return True

    def disown(self) -> None:
        """Inside standing(): the VM lives on elsewhere, perhaps in this very memory, which is not touched any more."""
        self.status = POSTMIGRATE
        for transport in self.parts.transports:
            transport.virtio.live = False
        self._io.stop()

    def rest(self, seconds: float, enough: threading.Event) -> None:
        """The vCPUs stand for so long, if they run: how a migration slows a guest that outruns it. When it is `enough`
        they go on standing, until standing() or unrest().
        """
        with self._life:
            if self.status == RUNNING:
                self._stop_vcpus()
                if not enough.wait(seconds):
                    self._gate.open()

    def unrest(self) -> None:
        """They go on, if the VM runs."""
        with self._life:
            if self.status == RUNNING:
                self._gate.open()

    # -- run state ---------------------------------------------------------------------------------

    def resume(self) -> None:
        """Let the vCPUs run (QMP cont)."""
        with self._life:
            if self.status in (PRELAUNCH, PAUSED, INMIGRATE):
                was, self.status = self.status, RUNNING
                self._begin_keeping()
                self._changed()
                self._gate.open()
                self.let_run = time.monotonic()
                if was != PRELAUNCH:
                    self._prepare_interrupts()
                    for transport in self.parts.transports:
                        transport.resume()
                self._tell("RESUME")

    def _prepare_interrupts(self) -> None:
        """What drivers are about to be told again is known to kvmcore in one message, not in three for each queue."""
        for transport in self.parts.transports:
            transport.prepare()
        with suppress(KvmError):  # it is gone, which is noticed elsewhere
            self.interrupts.prepare()

    @property
    def status_to_keep(self) -> str:
        """The run state that who takes our place is to find."""
        return self._becomes if self.status == INMIGRATE else self.status

    def keep_what_arrives(self, running: bool, decision: int, words: list[str]) -> None:
        """All of it is in place, and another process's until the file `decision` begins with one of the `words`: from then on
        the VM outlives us, if it is to, and runs or stands. KvmError."""
        self._becomes = RUNNING if running else PAUSED
        self._begin_keeping(decision, words)

    def arrive_paused(self) -> None:
        """The machine that has come stands until resume()."""
        with self._life:
            self.status = PAUSED
            self._begin_keeping()

    def pause(self) -> None:
        """Stop the vCPUs where they are (QMP stop); returns when they stand."""
        with self._life:
            if self.status == RUNNING:
                self._gate.close(self.vm, self.vcpus, PAUSE, STOP_SECONDS)
                self.status = PAUSED
                self._changed()
                self._tell("STOP")

    def _changed(self) -> None:
        if self.keeper is not None:
            self.keeper.machine_changed()

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Inside, nothing of the machine moves: vCPUs are parked, their exits completed, and the I/O thread serves
        nobody. Afterwards all goes on as it was before.
        """
        with self._life:
            running = self.status == RUNNING
            gc.disable()  # not now
            try:
                with self._io.frozen(self._stop_vcpus if running else None):
                    yield
            finally:
                if running and self.status == RUNNING:
                    self._gate.open()
                gc.enable()

    def _stop_vcpus(self) -> None:
        if not self._gate.close(self.vm, self.vcpus, PAUSE, STOP_SECONDS):
            self._gate.open()
            raise TimeoutError(f"a vCPU does not stop within {STOP_SECONDS:g} s")

    def reset(self) -> None:
        """As if the reset button were pressed. Any thread; done by wait()."""
        self._power("reset", 0)

    @property
    def settled(self) -> bool:
        """Whether the VM runs or is paused, and nobody has asked for a reset or an end that is not carried out yet: what a
        standing machine must be to be handed over.
        """
        return self.status in (RUNNING, PAUSED) and not self._power_asked

    def request_powerdown(self) -> bool:
        """Ask the guest to shut down, through its control port; False if it has nobody listening there."""
        return self.tell_agent("powerdown")

    def tell_agent(self, line: str) -> bool:
        """Say a line to the image's agent; False if nobody listens."""
        from qemu_user.devices.virtio.console import VirtioConsole

        for transport in self.parts.transports:
            if isinstance(transport.virtio, VirtioConsole):
                for port in transport.virtio.ports.values():
                    if port.name == _POWER_PORT and port.guest_open and port.input_room():
                        port.receive(line.encode() + b"\n")
                        return True
        return False

    def window_changed(self) -> None:
        """Our terminal has another size (SIGWINCH)."""
        self._loop.call_soon(self.parts.refresh_size)

    def quit(self, status: int = 0) -> None:
        """End the VM now, without asking the guest. Any thread, signal handlers too."""
        self._happenings.put(Happening("quit", status))

    request_stop = quit

    def fail(self, reason: str) -> None:
        """The VM cannot go on. Any thread."""
        self._happenings.put(Happening("fail", 1, reason))

    def _balloon_changed(self, pages: int) -> None:
        self._tell("BALLOON_CHANGE", actual=self.config.memory - pages * boot.PAGE)

    def _power(self, what: str, status: int) -> None:
        with self._power_lock:
            self._power_asked += 1
        if self.keeper is not None:
            self.keeper.power_asked(what, status)
        self._happenings.put(Happening(what, status))

    def _look_at_kvmcore(self) -> None:
        """The session's socket has something to say: that the VM's process is gone, if anything."""
        if not self.vm.alive:
            self._loop.remove(self.vm.link.fileno())
            self.fail(f"its kvmcore process ({self.vm.pid}) is gone")

    def _io_failed(self, error: BaseException) -> None:
        if isinstance(error, PageLost):
            self.fail(str(error))
            return
        trace = "".join(traceback.format_exception(error))
        self.fail(f"internal error in the I/O thread: {error!r}\n{trace}")

    # -- the end -----------------------------------------------------------------------------------

    def wait(self) -> int:
        """Deal with what happens until the VM ends; returns its exit status: 0 for a guest that shut down, 1
        if the VM failed, or what the guest gave the test device.
        """
        while True:
            happening = self._happenings.get()
            if happening.what == "reset" and self.parts.last_words and (why := self.parts.last_words.panic()):
                return self._end(Happening("fail", 1, f"its kernel has panicked: {why}"))
            if happening.what == "reset" and not self.config.no_reboot:
                self._reset()
                self._power_done()
            elif happening.what == "shutdown" and self.config.no_shutdown:
                self.pause()
                self.status = SHUTDOWN
                self._power_done()
                self._tell("SHUTDOWN", guest=True, reason="guest-shutdown")
            else:
                return self._end(happening)

    def _power_done(self) -> None:
        with self._power_lock:
            self._power_asked -= 1
        if self.keeper is not None:
            self.keeper.power_done()

    def _reset(self) -> None:
        with self._life:
            if self.status == POSTMIGRATE:
                return  # it is no longer ours
            running = self.status == RUNNING
            try:
                self._gate.close(self.vm, self.vcpus, PAUSE, STOP_SECONDS)
                for device in self.parts.devices:
                    device.reset()
                if self.interrupts is not None:
                    self.interrupts.reset()
                reset_state(self.vcpus)
                self._load()
            except (KvmError, OSError, boot.BootError) as error:
                self.fail(f"cannot be reset: {error}")
                return
            self._tell("RESET", guest=True, reason="guest-reset")
            if running:
                self._gate.open()

    def _end(self, happening: Happening) -> int:
        guest = happening.what in ("shutdown", "reset")
        if self.status == POSTMIGRATE:
            self._stop_threads()
            self.parts.drain_output(DRAIN_SECONDS)
            self.close()
            return happening.status & 0xFF
        if happening.what == "fail":
            self.failure, self.status = happening.reason, INTERNAL_ERROR
            self.warn(happening.reason)
        else:
            self.status = SHUTDOWN
        reason = {"shutdown": "guest-shutdown", "reset": "guest-reset", "fail": "host-error"}
        self._tell("SHUTDOWN", guest=guest, reason=reason.get(happening.what, "host-qmp-quit"))
        self._stop_threads()
        if happening.what != "quit":
            self.parts.finish_output(DRAIN_SECONDS)
        self.close()
        return happening.status & 0xFF

    def _stop_threads(self) -> None:
        if self.vm is not None and self.threads:
            self._gate.close(self.vm, self.vcpus, QUIT, STOP_SECONDS)
        self._io.join(STOP_SECONDS)

    def close(self) -> None:
        """Give everything back. Idempotent; start() and wait() call it."""
        if self.status == ENDED:
            return
        self._stop_threads()
        self.status = ENDED
        self.parts.close()
        if self.interrupts is not None:
            self.interrupts.close()
        if self._predecessor is not None:
            self._predecessor.leave()
        for handle in (self.vm, self._kvm):
            if handle is not None:
                try:
                    handle.close()
                except (KvmError, OSError):
                    pass  # the daemon may be gone already
        if self._kicks is not None:
            self._kicks.close()
        if self.flash is not None:
            self.flash.close()
        if self._memfd is None and self.ram_fd >= 0:
            os.close(self.ram_fd)
            self.ram_fd = -1
        self._io.close()

    # -- telling -----------------------------------------------------------------------------------

    def warn(self, sentence: str) -> None:
        """A line on stderr that names the VM."""
        sys.stderr.write(f"softkvm: VM {self.config.name}: {sentence}\n")
        sys.stderr.flush()

    def _disk_news(self, drive: str, event: str, text: str) -> None:
        """Something has happened to a disk; from any thread."""
        self.warn(f"disk {drive}: {text}")
        self._tell(event, device=drive, message=text)

    def _tell(self, event: str, **data: Any) -> None:
        for listener in tuple(self.listeners):
            listener(event, data)
