"""irqfd: an eventfd whose signal is an interrupt of the guest (KVM_ABI 1.9).

A signal goes through the GSI routing to the irqchip. Where that is one MSI, native code does it (native_irqfd.py), else the
VM process's I/O loop, which polls the eventfds. With
RESAMPLE the line stays up until the guest ends the interrupt; then the resample eventfd is signalled, and
its owner raises it again if the device still wants. Called by eventfd.py and by irqchip (end of interrupt).
"""

from __future__ import annotations

import os
import threading
from errno import EBUSY, EINVAL
from typing import TYPE_CHECKING

from kvmcore.vm.event_signal import EventSignal
from kvmcore.vm.native_irqfd import NativeIrqfds
from kvmcore.vm.objects import eventfd_of
from protocol.abi import structs
from protocol.abi.errors import KvmError

if TYPE_CHECKING:
    from kvmcore.vm.vm import Vm


class Irqfd:
    """One registration; owns duplicates of the client's descriptors."""

    def __init__(self, identity: int | None, fd: int, gsi: int, resample: EventSignal | None) -> None:
        self.identity = identity
        self.fd = fd
        self.gsi = gsi
        self.resample = resample
        self.slot: int | None = None
        """Of native_irqfd.py, if native code serves it."""

    def close(self) -> None:
        os.close(self.fd)
        if self.resample is not None:
            self.resample.close()


class Irqfds:
    """All irqfds of one VM."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._lock = threading.Lock()
        self._irqfds: list[Irqfd] = []
        self._native: NativeIrqfds | None = None

    @property
    def empty(self) -> bool:
        return not self._irqfds

    def assign(self, number: int, gsi: int, flags: int, resample_number: int) -> None:
        """KVM_IRQFD. EINVAL: flags, or not an eventfd; EBADF; EBUSY: this eventfd is an irqfd of the VM
        already.

        The gsi is not checked, and no irqchip is needed: a signal that leads nowhere is dropped, as Linux
        does here.
        """

        if flags & ~(structs.IRQFD_FLAG_DEASSIGN | structs.IRQFD_FLAG_RESAMPLE):
            raise KvmError(EINVAL, reason=f"flags {flags:#x}")
        file = eventfd_of(self._vm.session, number)
        identity = file.eventfd_id
        if flags & structs.IRQFD_FLAG_DEASSIGN:
            self._deassign(identity, gsi)
            return
        resample = (
            eventfd_of(self._vm.session, resample_number) if flags & structs.IRQFD_FLAG_RESAMPLE else None
        )
        with self._lock:
            if any(irqfd.identity == identity for irqfd in self._irqfds):
                raise KvmError(EBUSY, reason="this eventfd is an irqfd already")
            irqfd = Irqfd(identity, file.dup(), gsi, EventSignal(resample.dup()) if resample else None)
            self._irqfds.append(irqfd)
        # A counter that is not zero already makes the descriptor readable, hence an interrupt at once.
        self._place(irqfd)

    def rerouted(self) -> None:
        """The GSI routing is another one."""
        for irqfd in list(self._irqfds):
            self._vm.loop.remove_reader(irqfd.fd)
            self._place(irqfd)

    def _place(self, irqfd: Irqfd) -> None:
        """Have it served by whom it concerns now."""
        chip = self._vm.irqchip
        target = chip.native_target(irqfd.gsi) if chip is not None and irqfd.resample is None else 0
        if target and irqfd.slot is not None and self._native is not None:
            self._native.retarget(irqfd.slot, target)
            return
        self._take_away(irqfd)
        if target:
            if self._native is None:
                self._native = NativeIrqfds(self._vm.machine.image)
            irqfd.slot = self._native.add(irqfd.fd, target)
        if irqfd.slot is None:
            self._vm.loop.add_reader(irqfd.fd, lambda: self._signalled(irqfd))

    def _take_away(self, irqfd: Irqfd) -> None:
        if irqfd.slot is not None and self._native is not None:
            self._native.remove(irqfd.slot)
            irqfd.slot = None

    def _deassign(self, identity: int | None, gsi: int) -> None:
        with self._lock:
            gone = [irqfd for irqfd in self._irqfds if irqfd.identity == identity and irqfd.gsi == gsi]
            self._irqfds = [irqfd for irqfd in self._irqfds if irqfd not in gone]
        self._drop(gone)

    def _signalled(self, irqfd: Irqfd) -> None:
        """On the I/O thread: the eventfd's counter is not zero."""
        try:
            # The client may read its eventfd too, so it can be empty again: never block the I/O thread on it.
            os.preadv(irqfd.fd, [bytearray(8)], -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return
        chip = self._vm.irqchip
        if chip is None:
            return
        if irqfd.resample is not None:
            chip.set_gsi(irqfd.gsi, True)
        else:
            chip.pulse_gsi(irqfd.gsi)

    def end_of_interrupt(self, gsi: int) -> bool:
        """The guest has ended the interrupt of `gsi`: lower resampled lines and tell their owners.

        True when there was one. Called on a vCPU's thread.
        """
        if not self._irqfds:
            return False
        with self._lock:
            signals = [irqfd.resample for irqfd in self._irqfds if irqfd.gsi == gsi and irqfd.resample is not None]
        for signal in signals:  # without the lock: it may block
            signal.send()
        return bool(signals)

    def release(self) -> None:
        """Drop them all."""
        with self._lock:
            gone, self._irqfds = self._irqfds, []
        self._drop(gone)
        if self._native is not None:
            self._native.close()
            self._native = None

    def _drop(self, irqfds: list[Irqfd]) -> None:
        for irqfd in irqfds:
            self._vm.loop.remove_reader(irqfd.fd)
            self._take_away(irqfd)
            irqfd.close()
