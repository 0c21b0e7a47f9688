"""The VM: what KVM_CREATE_VM makes, the root of the lifetime graph of KVM_ABI 1.14.

It lives until the last of {VM, vCPU, device, statistics, guest_memfd} handles is closed; then `on_destroyed` runs
(the VM process ends). Holds the parts that the ioctl handlers work on: memory, eventfds, irqchip, vCPUs, and the
engine's Machine. Called by kvmcore/ioctl and by the server of the VM process. Must never know of frames.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from errno import EEXIST, EINVAL, EIO
from typing import TYPE_CHECKING

from kvmcore.vm.accelerator import INTERPRETER
from kvmcore.vm.capabilities import VmCaps
from kvmcore.vm.eventfd import Eventfds
from kvmcore.vm.memory import Memory
from kvmcore.vm.objects import Handle, Loop, Session
from kvmcore.vm.statistics import VmStats
from protocol.abi.errors import KvmError
from protocol.channel.shared_memory import PAGE, Mapping, create_memfd

if TYPE_CHECKING:
    from kvmcore.engine.machine import Machine
    from kvmcore.vm.irqchip.aia import Aia
    from kvmcore.vm.vcpu import Vcpu

#: Linux's KVM_MAX_VCPU_IDS and KVM_MAX_VCPUS on RISC-V.
MAX_VCPUS = 1024


_used: list[Machine] = []
"""Machines of VMs that are gone, as new, for the next ones of this process."""
_MOST_USED = 2


def _machine(translator: str) -> Machine:
    from kvmcore.engine.machine import Machine
    from kvmcore.vm.accelerator import native_image

    try:
        machine = _used.pop()
    except IndexError:
        machine = Machine(native_image(), max_harts=MAX_VCPUS)
    if translator:
        machine.translate(translator)
    return machine


def spare_machine(translator: str) -> Machine:
    """The engine's half of a VM that nobody has asked for yet."""
    return _machine(translator)


class Vm(Handle):
    """One virtual machine. `lock` is Linux's kvm->lock; order: vm.lock, then vcpu.mutex, then memory's lock."""

    kind = "vm"

    def __init__(
        self, session: Session, loop: Loop, *, name: str = "", accel: str = INTERPRETER, translator: str = "",
        machine: Machine | None = None,
    ) -> None:  # fmt: skip
        """`accel`: one of accelerator.ACCELERATORS; `translator`: the path of its socket; `machine`: made before, for both."""
        self.session = session
        self.loop = loop
        self.name = name
        self.accel = accel
        self._translator = translator
        self.lock = threading.RLock()
        self.dead = False
        self.vcpus: list[Vcpu] = []
        """By index, which is creation order. Index 0 boots."""
        self.vcpus_by_id: dict[int, Vcpu] = {}
        self.power_lock = threading.RLock()
        """Decides races between starting and stopping vCPUs (mp_state.py). Below vm.lock."""
        self.caps = VmCaps(self)
        self.stats = VmStats()
        self.memory = Memory(self)
        self.eventfds = Eventfds(self)
        self.irqchip: Aia | None = None
        self.on_destroyed: Callable[[], None] = lambda: None
        self.on_idle: Callable[[], None] = lambda: None
        """Called on the I/O thread once the VM is destroyed and its vCPUs' threads have ended: release() may be called."""
        self._machine = machine
        self.tells_engine = False
        """Whether changes of memory slots and buses go to the engine's half at once; see begin_running()."""
        self.published = False
        """Whether the engine's half has been told of memory and buses: a vCPU has begun to run."""
        self._publishing = threading.Lock()
        """Above memory's lock."""
        self._ring: tuple[int, Mapping] | None = None
        self._references = 0
        self._threads = 0
        self._counts_lock = threading.Lock()
        """For _references, _threads and _ring."""

    # -- lifetime ---------------------------------------------------------------------------------------------

    def get(self) -> None:
        """Take a reference: the VM stays until it is put back."""
        with self._counts_lock:
            self._references += 1

    def put(self) -> None:
        """Give a reference back; the last one destroys the VM."""
        with self._counts_lock:
            self._references -= 1
            last = self._references == 0
        if last:
            self.destroy()

    def opened(self) -> None:
        self.get()

    def closed(self) -> None:
        """The VM's own handle is closed: irqfds go at once, even if vCPUs keep the VM (KVM_ABI 1.9)."""
        self.eventfds.release_irqfds()
        self.put()

    def destroy(self) -> None:
        """Stop everything: vCPUs leave the guest within moments and answer EIO from now on. Idempotent."""
        if self.dead:
            return
        with self._counts_lock:
            self.dead = True
            idle = not self._threads
        for vcpu in self.vcpus:
            vcpu.shut_down()
        self.on_destroyed()
        if idle:
            self.on_idle()

    def thread_begins(self) -> bool:
        """A vCPU's thread is about to be started; False: not any more."""
        with self._counts_lock:
            self._threads += not self.dead
            return not self.dead

    def thread_ends(self) -> None:
        """A vCPU's thread ends; after the last one nobody uses what is the VM's."""
        with self._counts_lock:
            self._threads -= 1
            last = self.dead and not self._threads
        if last:
            self.loop.call_soon_threadsafe(self.on_idle)

    def release(self) -> None:
        """Give everything back, as a process that goes on with other VMs must. Nobody may use the VM afterwards."""
        self.memory.release()
        self.eventfds.release()
        for vcpu in self.vcpus:
            vcpu.release()
        self.vcpus.clear()
        self.vcpus_by_id.clear()
        self.irqchip = None
        machine, self._machine = self._machine, None
        if machine is not None:
            if len(_used) < _MOST_USED:
                machine.renew()
                _used.append(machine)
            else:
                machine.close()
        ring, self._ring = self._ring, None
        if ring is not None:
            ring[1].close()
            os.close(ring[0])

    def farewell(self) -> None:
        """Just before the process ends, with the vCPUs stopped."""
        if self._machine is not None and self._machine.hot_code is not None:
            self._machine.hot_code.close()

    def check_alive(self) -> None:
        """KvmError(EIO) once the VM is dead, whatever is asked of it (KVM_ABI 1.1 b)."""
        if self.dead:
            raise KvmError(EIO, reason="the VM is dead")

    # -- vCPUs ------------------------------------------------------------------------------------------------

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU. EINVAL: id out of range; EEXIST: the id was ever used in this VM (KVM_ABI 1.2)."""
        from kvmcore.vm.vcpu import Vcpu

        with self.lock:
            if not 0 <= vcpu_id < MAX_VCPUS or len(self.vcpus) >= MAX_VCPUS:
                raise KvmError(EINVAL, reason=f"vCPU ids are 0 to {MAX_VCPUS - 1}")
            if vcpu_id in self.vcpus_by_id:
                raise KvmError(EEXIST, reason=f"vCPU {vcpu_id} exists")
            vcpu = Vcpu(self, vcpu_id, index=len(self.vcpus))
            self.vcpus.append(vcpu)
            self.vcpus_by_id[vcpu_id] = vcpu
            return vcpu

    @property
    def ring_memfd(self) -> int:
        """The memfd of the coalesced-MMIO ring: one page, seen as page 1 of every vCPU's mapping (KVM_ABI 1.3)."""
        return self._the_ring()[0]

    @property
    def ring(self) -> Mapping:
        """The same, mapped."""
        return self._the_ring()[1]

    @property
    def ring_view(self) -> memoryview | None:
        """Its bytes, if there is a ring yet."""
        ring = self._ring
        return ring[1].view if ring is not None else None

    def _the_ring(self) -> tuple[int, Mapping]:
        with self._counts_lock:
            if self._ring is None:
                memfd = create_memfd("kvm-coalesced-ring", PAGE)
                try:
                    self._ring = memfd, Mapping([(memfd, 0, PAGE)])
                except BaseException:
                    os.close(memfd)
                    raise
            return self._ring

    @property
    def ran_once(self) -> bool:
        """Whether any vCPU has entered KVM_RUN: much is frozen from then on (KVM_ABI 1.14)."""
        return any(vcpu.ran_once for vcpu in self.vcpus)

    # -- the engine -------------------------------------------------------------------------------------------

    @property
    def machine(self) -> Machine:
        """The engine's half of this VM; made on first use, so that a VM without vCPUs costs no engine."""
        if self._machine is None:
            with self.lock:
                if self._machine is None:
                    self._machine = _machine(self._translator)
        return self._machine

    def hot_here(self) -> bytes:
        """What code is hot, in the translator's words, for another host that is to run this VM; b"" if there is none."""
        code = self._machine.hot_code if self._machine is not None else None
        return code.hot_here() if code is not None else b""

    def hot_elsewhere(self, told: bytes) -> None:
        """What hot_here() said on the host that ran this VM before: translated when there is time, like what earlier VMs left.
        KvmError(EINVAL)."""
        code = self._machine.hot_code if self._machine is not None else None
        if code is not None:
            try:
                code.hot_elsewhere(told)
            except ValueError as error:
                raise KvmError(EINVAL, reason=str(error)) from error

    def prepare_hot(self) -> None:
        """Its memory is there now: what can be done before it runs is done."""
        code = self._machine.hot_code if self._machine is not None else None
        if code is not None:
            self.begin_running()  # it looks at memory
            code.prepare()

    def begin_running(self) -> None:
        """A vCPU is about to enter the guest: from now on the engine's half is told of memory slots and buses as they change.

        Before the first KVM_RUN nobody looks at them there, and many VMs never come to that.
        """
        if not self.published:
            with self._publishing:
                if not self.published:
                    self.tells_engine = True
                    self.memory.publish()
                    self.eventfds.publish()
                    self.published = True

    def look_if_idle(self) -> None:
        """Called now and then: a VM that does nothing gives memory back."""
        if self._machine is not None and not self.dead:
            self._machine.look_if_idle()

    @property
    def has_machine(self) -> bool:
        """Whether the engine's half exists yet."""
        return self._machine is not None

    @property
    def label(self) -> str:
        """How statistics and logs call this VM: kvm-PID, as Linux does."""
        return f"kvm-{os.getpid()}"
