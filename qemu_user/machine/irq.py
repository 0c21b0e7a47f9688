"""Interrupt wires: from a device's line to the in-kernel AIA or to our PLIC, and the tree's words for it.

With AIA, virtio interrupts are edges through irqfds (an eventfd write, no exit and no request); the other
devices' are levels through KVM_IRQ_LINE. The PLIC, whose outputs are KVM_INTERRUPT, is there in both cases: without AIA
it is what the tree names; with it, the tree is silent, but a guest with QEMU's addresses built in finds it where it looks.
Made and used by machine/build.py.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from errno import ECONNRESET
from itertools import islice
from typing import TYPE_CHECKING, Literal, Protocol

from protocol.abi import structs_riscv as riscv
from protocol.abi.errors import KvmError
from protocol.abi.structs import DEV_TYPE_RISCV_AIA
from qemu_user.devices.device import FdtNode, InterruptLine, State, StateError, require
from qemu_user.devices.pci.msix import MakeVector
from qemu_user.devices.plic import Plic
from qemu_user.machine import virt
from qemu_user.machine.msi import MsiRoutes

if TYPE_CHECKING:
    from protocol.client import Vcpu, Vm
    from protocol.client.batch import Batch

EDGE_RISING, LEVEL_HIGH = 1, 4
"""Second interrupt cell under the APLIC (RISC-V AIA device-tree binding)."""
_SUPERVISOR_EXTERNAL = 9
_EIDELIVERY, _EITHRESHOLD, _EIP, _EIE = 0x70, 0x72, 0x80, 0xC0
"""Registers of an IMSIC interrupt file (AIA specification, section 3.8)."""
_DOMAINCFG, _SOURCECFG, _TARGET = 0x0000, 0x0004, 0x3004
_SETIP, _CLRIP, _SETIE, _CLRIE = 0x1C00, 0x1D00, 0x1E00, 0x1F00
"""Registers of the APLIC (AIA specification, section 4.5)."""
_WORDS = (virt.INTERRUPT_SOURCES + 32) // 32
_EVEN = range(0, (virt.IMSIC_IDENTITIES + 1) // 32, 2)  # 64-bit registers have even numbers
_IMSIC_REGISTERS = [_EIDELIVERY, _EITHRESHOLD, *(_EIP + word for word in _EVEN), *(_EIE + word for word in _EVEN)]
PHANDLE_CONTROLLER, PHANDLE_IMSIC = 1, 2
PHANDLE_TEST = 3
PHANDLE_CPU = 0x10
"""The controller of hart i has phandle PHANDLE_CPU + 2 * i, the hart itself one more."""


def _aplic(first: int, count: int) -> list[tuple[int, int]]:
    """(group, attribute) of `count` APLIC registers from an offset on."""
    return [(riscv.AiaGroup.APLIC, first + 4 * index) for index in range(count)]


def _imsic(cpu: int) -> list[tuple[int, int]]:
    """(group, attribute) of a vCPU's IMSIC registers."""
    return [(riscv.AiaGroup.IMSIC, riscv.aia_imsic_attr(cpu, register)) for register in _IMSIC_REGISTERS]


class AiaState(State, frozen=True, tag="aia", kw_only=True):
    """The registers of APLIC and IMSICs, by their numbers as device attributes. Lines are the devices' state."""

    version: Literal[1] = 1
    domaincfg: int
    sourcecfg: list[int]
    target: list[int]
    pending: list[int]
    """setip, in words of 32 sources."""
    enabled: list[int]
    imsics: list[list[int]]
    """Per vCPU: eidelivery, eithreshold, eip0, eip2, ..., eie0, eie2, ..."""


class EdgeLine:
    """An irqfd: each assertion is a pulse."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def assert_line(self) -> None:
        os.eventfd_write(self._fd, 1)

    def release_line(self) -> None:
        pass


class LevelLine:
    """KVM_IRQ_LINE, on changes only. `level`: what it is; None: as somebody else has left it."""

    def __init__(self, drive: Callable[[bool], None], level: bool | None = False) -> None:
        self._drive = drive
        self._level = level
        self._lock = threading.Lock()

    def settle(self) -> None:
        """Nobody has said anything of it: it is low."""
        if self._level is None:
            self.release_line()

    def assert_line(self) -> None:
        self._set(True)

    def release_line(self) -> None:
        self._set(False)

    def _set(self, level: bool) -> None:
        with self._lock:
            if level != self._level:
                self._level = level
                _tell(lambda: self._drive(level))


def _tell(call: Callable[[], None]) -> None:
    """Drive a wire of kvmcore's. When its process is gone the machine notices by itself, and no wire matters."""
    try:
        call()
    except KvmError as error:
        if error.errno != ECONNRESET:
            raise


class BothLines:
    """A wire that leads to two controllers; the guest has enabled its source in one of them at most."""

    def __init__(self, first: InterruptLine, second: InterruptLine) -> None:
        self._first, self._second = first, second

    def assert_line(self) -> None:
        self._first.assert_line()
        self._second.assert_line()

    def release_line(self) -> None:
        self._first.release_line()
        self._second.release_line()


class Interrupts(Protocol):
    """The interrupt controller of a machine. `plic` still has to be put on the bus."""

    plic: Plic
    in_tree: bool
    """Whether the PLIC is what the device tree names."""
    msi: MakeVector | None
    """Makes MSI vectors; None where there are no MSIs."""

    def edge(self, irq: int) -> InterruptLine:
        """The wire of a source whose device pulses."""

    def level(self, irq: int) -> InterruptLine:
        """The wire of a source whose device holds it."""

    def cells(self, irq: int, edge: bool) -> list[int]:
        """The `interrupts` property."""

    def nodes(self) -> list[FdtNode]:
        """The controllers' tree nodes."""

    def reset(self) -> None:
        """The machine is reset, the vCPUs are parked: nothing is pending or enabled any more."""

    def save(self, batch: Batch) -> Callable[[], AiaState | None]:
        """Ask for the in-kernel part's state; what gives it when the batch was sent: None where the controller is a device
        like the others."""

    def check(self, state: AiaState) -> None:
        """StateError unless restore() can take `state`."""

    def connect(self) -> None:
        """The wires that edge() has made so far lead to the controller."""

    def settle(self) -> None:
        """The devices have taken a dead process's place: wires that none of them has driven are low."""

    def prepare(self) -> None:
        """Messages that devices have announced (VirtioTransport.prepare) are made known to kvmcore."""

    @property
    def handle(self) -> int:
        """The number of the in-kernel controller's handle, -1 if there is none."""

    def restore(self, state: AiaState, batch: Batch, before: AiaState | None = None) -> Callable[[], None]:
        """Ask it to become what the checked `state` says. To be called when the devices have set their lines. `before`: what it
        has become already. Returns what looks at the answer: StateError.
        """

    def close(self) -> None:
        """Give descriptors back."""


class AiaInterrupts:
    """APLIC and IMSICs in kvmcore. Make it before the vCPUs run; finish() after all vCPUs are made."""

    in_tree = False
    plic: Plic

    def __init__(self, vm: Vm, handle: int = -1) -> None:
        """`handle`: of one that is there already, configured."""
        from protocol.client.device import Device as KvmDevice

        self._vm = vm
        self._there = handle >= 0
        self._device = KvmDevice(vm.link, vm.channel, handle) if self._there else vm.create_device(DEV_TYPE_RISCV_AIA)
        self._levels: list[LevelLine] = []
        self._fds: list[int] = []
        self._unknown: list[tuple[int, int]] = []
        """Wires (eventfd, source) that kvmcore has yet to hear of."""
        self._cpus = 0
        self._routes = MsiRoutes(vm, virt.INTERRUPT_SOURCES + 1)
        self.msi: MakeVector | None = self._routes.make

    def finish(self, vcpus: list[Vcpu]) -> None:
        """Configure and initialise (KVM_ABI 1.10)."""
        self.plic = _plic(vcpus)
        self._cpus = cpus = len(vcpus)
        if self._there:
            return
        config, address = riscv.AiaGroup.CONFIG, riscv.AiaGroup.ADDR
        aplic, imsic = virt.PLACES["aplic"].base, virt.PLACES["imsic"].base
        values = [
            (config, riscv.AiaConfig.SRCS, virt.INTERRUPT_SOURCES.to_bytes(4, "little")),
            (config, riscv.AiaConfig.IDS, virt.IMSIC_IDENTITIES.to_bytes(4, "little")),
            (config, riscv.AiaConfig.HART_BITS, max(cpus - 1, 0).bit_length().to_bytes(4, "little")),
            (address, riscv.AIA_ADDR_APLIC, aplic.to_bytes(8, "little")),
        ]
        for index in range(cpus):
            base = imsic + virt.IMSIC_STRIDE * index
            values.append((address, riscv.aia_addr_imsic(index), base.to_bytes(8, "little")))
        batch = self._vm.batch()
        answers = [batch.set_attr(self._device, *value) for value in values]
        answers.append(batch.set_attr(self._device, riscv.AiaGroup.CTRL, riscv.AIA_CTRL_INIT, None))
        batch.send()
        for answer in answers:
            answer.checked()

    def edge(self, irq: int) -> InterruptLine:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fds.append(fd)
        self._unknown.append((fd, irq))
        return BothLines(EdgeLine(fd), self.plic.line(irq))

    def level(self, irq: int) -> InterruptLine:
        line = LevelLine(lambda level: self._vm.irq_line(irq, int(level)), None if self._there else False)
        self._levels.append(line)
        return BothLines(line, self.plic.line(irq))

    def connect(self) -> None:
        batch = self._vm.batch()
        answers = [batch.irqfd(self._vm, fd, irq) for fd, irq in self._unknown]
        batch.send()
        for answer in answers:
            answer.checked()
        self._unknown = []

    def settle(self) -> None:
        for line in self._levels:
            line.settle()

    def prepare(self) -> None:
        self._routes.settle()

    @property
    def handle(self) -> int:
        return self._device.number

    def cells(self, irq: int, edge: bool) -> list[int]:
        return [irq, EDGE_RISING if edge else LEVEL_HIGH]

    def nodes(self) -> list[FdtNode]:
        aplic, imsic = virt.PLACES["aplic"], virt.PLACES["imsic"]
        extended: list[int] = []
        for index in range(self._cpus):
            extended += [PHANDLE_CPU + 2 * index, _SUPERVISOR_EXTERNAL]
        return [
            FdtNode(
                f"interrupt-controller@{aplic.base:x}",
                {
                    "compatible": "riscv,aplic",
                    "reg": [0, aplic.base, 0, aplic.size],
                    "interrupt-controller": True,
                    "#interrupt-cells": 2,
                    "#address-cells": 0,
                    "msi-parent": PHANDLE_IMSIC,
                    "riscv,num-sources": virt.INTERRUPT_SOURCES,
                    "phandle": PHANDLE_CONTROLLER,
                },
            ),
            FdtNode(
                f"interrupt-controller@{imsic.base:x}",
                {
                    "compatible": "riscv,imsics",
                    "reg": [0, imsic.base, 0, virt.IMSIC_STRIDE * self._cpus],
                    "interrupt-controller": True,
                    "#interrupt-cells": 0,
                    "#address-cells": 0,
                    "msi-controller": True,
                    "#msi-cells": 0,
                    "interrupts-extended": extended,
                    "riscv,num-ids": virt.IMSIC_IDENTITIES,
                    "phandle": PHANDLE_IMSIC,
                },
            ),
        ]

    def reset(self) -> None:
        self._device.set_attrs([(*key, 0) for cpu in range(self._cpus) for key in _imsic(cpu)])

    def save(self, batch: Batch) -> Callable[[], AiaState]:
        sources = virt.INTERRUPT_SOURCES
        parts = [(_DOMAINCFG, 1), (_SOURCECFG, sources), (_TARGET, sources), (_SETIP, _WORDS), (_SETIE, _WORDS)]
        keys = [key for first, count in parts for key in _aplic(first, count)]
        keys += [key for cpu in range(self._cpus) for key in _imsic(cpu)]
        answer = batch.get_state(self._device, self._device.keys(keys))

        def saved() -> AiaState:
            values = iter(answer.words())
            (domaincfg,), sourcecfg, target, pending, enabled = (list(islice(values, count)) for _, count in parts)
            return AiaState(
                domaincfg=domaincfg,
                sourcecfg=sourcecfg,
                target=target,
                pending=pending,
                enabled=enabled,
                imsics=[list(islice(values, len(_IMSIC_REGISTERS))) for _ in range(self._cpus)],
            )

        return saved

    def check(self, state: AiaState) -> None:
        sources = virt.INTERRUPT_SOURCES
        require(len(state.sourcecfg) == len(state.target) == sources, f"aia: this machine has {sources} sources")
        require(len(state.pending) == len(state.enabled) == _WORDS, "aia: wrong number of words")
        require(len(state.imsics) == self._cpus, f"aia: {len(state.imsics)} IMSICs for {self._cpus} CPUs")
        words = (state.domaincfg, *state.sourcecfg, *state.target, *state.pending, *state.enabled)
        require(all(0 <= word < 1 << 32 for word in words), "aia: an APLIC register out of range")
        for imsic in state.imsics:
            require(len(imsic) == len(_IMSIC_REGISTERS), "aia: wrong number of IMSIC registers")
            require(all(0 <= value < 1 << 64 for value in imsic), "aia: an IMSIC register out of range")

    def restore(self, state: AiaState, batch: Batch, before: AiaState | None = None) -> Callable[[], None]:
        everything = [0xFFFFFFFF] * _WORDS
        # With the domain off nothing is delivered while sources take their modes and lines.
        parts = [
            (_DOMAINCFG, [0]), (_SOURCECFG, state.sourcecfg), (_TARGET, state.target), (_CLRIP, everything),
            (_SETIP, state.pending), (_CLRIE, everything), (_SETIE, state.enabled), (_DOMAINCFG, [state.domaincfg]),
        ]  # fmt: skip
        if before is not None and (before.sourcecfg, before.target) == (state.sourcecfg, state.target):
            del parts[1:3]
        values = [
            (*key, value)
            for cpu, imsic in enumerate(state.imsics)
            for key, value in zip(_imsic(cpu), imsic, strict=True)
        ]
        for first, words in parts:
            values += [(*key, word) for key, word in zip(_aplic(first, len(words)), words, strict=True)]
        answer = batch.set_state(self._device, self._device.flat(values))

        def done() -> None:
            try:
                answer.checked()
            except KvmError as error:
                raise StateError(f"aia: {error}") from error

        return done

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self._routes.close()


def _plic(vcpus: list[Vcpu]) -> Plic:
    controllers = [PHANDLE_CPU + 2 * index for index in range(len(vcpus))]
    return Plic("plic", len(vcpus), lambda hart, level: _tell(lambda: vcpus[hart].interrupt(level)), controllers)


class PlicInterrupts:
    """The PLIC alone."""

    in_tree = True

    def __init__(self, vcpus: list[Vcpu]) -> None:
        self.msi: MakeVector | None = None
        self.plic = _plic(vcpus)

    def edge(self, irq: int) -> InterruptLine:
        return self.plic.line(irq)

    def level(self, irq: int) -> InterruptLine:
        return self.plic.line(irq)

    def cells(self, irq: int, edge: bool) -> list[int]:
        return [irq]

    def nodes(self) -> list[FdtNode]:
        return []  # the PLIC describes itself, being a device

    def connect(self) -> None:
        pass  # they do

    def settle(self) -> None:
        pass  # the PLIC has been restored as a device, and drives its vCPUs

    def prepare(self) -> None:
        pass

    @property
    def handle(self) -> int:
        return -1

    def reset(self) -> None:
        pass  # the PLIC is reset with the other devices

    def save(self, batch: Batch) -> Callable[[], AiaState | None]:
        return lambda: None  # and saved with them

    def check(self, state: AiaState) -> None:
        raise StateError("the saved machine has an AIA, this one a PLIC")

    def restore(self, state: AiaState, batch: Batch, before: AiaState | None = None) -> Callable[[], None]:
        return lambda: self.check(state)

    def close(self) -> None:
        pass
