"""A whole machine's state but for its memory and disks: captured into sections, checked, restored.

The machine must stand (Machine.standing()) while capture() or restore() works. check() looks at everything before
restore() changes anything, so that a refusal leaves nothing half done. Sections: "config", "machine", "vcpu/N", "aia",
"device/NAME", and what the caller adds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from protocol.abi import structs_riscv as riscv
from qemu_user.config.errors import ConfigError
from qemu_user.config.machine_config import MachineConfig
from qemu_user.devices.device import State, StateError, decode_state, encode_state, require
from qemu_user.machine import vcpu_state
from qemu_user.machine.irq import AiaState
from qemu_user.machine.vcpu_state import VcpuState
from qemu_user.migration.sections import Section

if TYPE_CHECKING:
    from qemu_user.machine.machine import Machine

CONFIG_VERSION = 2
"""Version 1 has no `boot.initrd_files`; it is read as it is."""
_LONGEST_ABSENCE = 60.0
"""Seconds: a machine that was away longer finds its clock as it left it, as after QEMU's loadvm."""


class MachineState(State, frozen=True, tag="machine", kw_only=True):
    """What belongs to no vCPU and no device."""

    version: Literal[1] = 1
    time: int
    """The guest's time CSR, in ticks."""
    frequency: int
    taken: float
    """Host's CLOCK_REALTIME at that moment, seconds."""
    generation: int = 0
    """How often the VM has moved: the higher one is the one that may run."""


def config_section(config: MachineConfig) -> Section:
    """The configuration that a machine must be built from to take this state."""
    return Section("config", CONFIG_VERSION, msgspec.msgpack.encode(config))


def read_config(sections: Mapping[str, Section]) -> MachineConfig:
    """The configuration in a container, checked but for its files (they are another host's). StateError."""
    section = find(sections, "config")
    require(1 <= section.version <= CONFIG_VERSION, f"config: version {section.version} is not known here")
    try:
        return msgspec.msgpack.decode(section.payload, type=MachineConfig).validate(files=False)
    except (msgspec.MsgspecError, UnicodeDecodeError, ConfigError) as error:
        raise StateError(f"config: {error}") from error


def find(sections: Mapping[str, Section], name: str) -> Section:
    """The section of that name; StateError if there is none."""
    section = sections.get(name)
    if section is None:
        raise StateError(f"section {name} is missing")
    return section


def capture(machine: Machine, generation: int | None = None, with_config: bool = True) -> list[Section]:
    """All of a standing machine, as it is to go on in `generation` (its own). The configuration, which may be large, does not
    change: who has it needs it not again. KvmError when its kvmcore process is gone.
    """
    batch = machine.vm.batch()
    clock = batch.get_state(machine.vcpus[0], [riscv.TIMER_ID["time"], riscv.TIMER_ID["frequency"]])
    vcpus = [vcpu_state.save(vcpu, batch) for vcpu in machine.vcpus]
    aia = machine.interrupts.save(batch)
    batch.send()
    now, frequency = clock.words()
    own = MachineState(
        time=now,
        frequency=frequency,
        taken=time.time(),
        generation=machine.generation if generation is None else generation,
    )
    sections = [config_section(machine.config)] if with_config else []
    sections.append(_section("machine", own))
    sections += [_section(f"vcpu/{vcpu.id}", saved()) for vcpu, saved in zip(machine.vcpus, vcpus, strict=True)]
    if (controller := aia()) is not None:
        sections.append(_section("aia", controller))
    sections += [_section(f"device/{device.name}", device.save()) for device in machine.parts.devices]
    return sections


def _section(name: str, state: State) -> Section:
    return Section(name, state.version, encode_state(state))


class Checked(msgspec.Struct, frozen=True):
    """A state that this machine can take."""

    machine: MachineState
    vcpus: list[VcpuState]
    aia: AiaState | None
    devices: list[Any]


def check(machine: Machine, sections: Mapping[str, Section], before: Checked | None = None) -> Checked:
    """Everything that can be known before anything is changed. `before`: an earlier state of the same VM that was checked.
    StateError says what does not fit."""
    own = decode_state(MachineState, find(sections, "machine").payload)
    require(0 <= own.time < 1 << 64 and 0 <= own.generation < 1 << 63, "machine: time or generation out of range")
    if before is not None:
        ours = before.machine.frequency
    else:
        ours = machine.vcpus[0].get_one_reg(riscv.TIMER_ID["frequency"])
    require(own.frequency == ours, f"machine: a time base of {own.frequency} Hz, this host has {ours} Hz")
    vcpus = []
    for vcpu in machine.vcpus:
        state = decode_state(VcpuState, find(sections, f"vcpu/{vcpu.id}").payload)
        require(state.index == vcpu.id, f"vcpu/{vcpu.id}: is another CPU's")
        vcpu_state.check(state, vcpu)
        vcpus.append(state)
    aia = None
    if "aia" in sections:
        aia = decode_state(AiaState, sections["aia"].payload)
        machine.interrupts.check(aia)
    else:
        require(machine.config.aia == "none", "section aia is missing")
    devices = [
        decode_state(type(device).State, find(sections, f"device/{device.name}").payload)
        for device in machine.parts.devices
    ]
    known = {f"vcpu/{vcpu.id}" for vcpu in machine.vcpus} | {f"device/{d.name}" for d in machine.parts.devices}
    strange = sorted(name for name in sections if name.startswith(("vcpu/", "device/")) and name not in known)
    require(not strange, f"the saved machine has parts that this one lacks: {', '.join(strange)}")
    return Checked(own, vcpus, aia, devices)


def restore(machine: Machine, checked: Checked, before: Checked | None = None) -> None:
    """Become it. The machine stands and has not run; its memory is in place. `before`: an earlier state of the same VM
    that it has become already, while there was time. StateError.
    """
    batch = machine.vm.batch()
    answers = [
        vcpu_state.restore(state, vcpu, batch, before.vcpus[index] if before is not None else None)
        for index, (vcpu, state) in enumerate(zip(machine.vcpus, checked.vcpus, strict=True))
    ]
    batch.send()  # before the devices, whose lines may lead to vCPUs
    # Where pages have yet to come, restoring is also what brings the rings.
    known = before.devices if before is not None and machine.memory.absent is None else [None] * len(checked.devices)
    with machine.wiring():
        for device, saved, there in zip(machine.parts.devices, checked.devices, known, strict=True):
            if saved != there:
                device.restore(saved)
    batch = machine.vm.batch()
    if checked.aia is not None:
        answers.append(machine.interrupts.restore(checked.aia, batch, before.aia if before is not None else None))
    away = time.time() - checked.machine.taken
    ticks = int(away * checked.machine.frequency) if 0 < away < _LONGEST_ABSENCE else 0
    clock = batch.set_state(machine.vcpus[0], [riscv.TIMER_ID["time"], checked.machine.time + ticks])
    batch.send()
    for answer in answers:
        answer()
    clock.checked()
    machine.generation = checked.machine.generation
