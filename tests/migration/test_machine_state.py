"""A machine's state taken out of one VM and put into another, which goes on as if nothing had been."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import pytest

from qemu_user.devices.device import StateError
from qemu_user.devices.pci.msix import ENABLE, ENTRY_SIZE
from qemu_user.devices.virtio.pci import VirtioPci
from qemu_user.machine import virt
from qemu_user.machine.machine import INMIGRATE, PAUSED, RUNNING, Machine
from qemu_user.migration import machine_state, sections
from tests.framework import memory_guest


def test_state_moves_between_machines(endpoint, goes_on, tmp_path: Path) -> None:
    config = memory_guest.config(tmp_path, "one", cpus=2, drives=(memory_guest.drive(tmp_path / "disk"),))
    one = Machine(config, endpoint)
    one.start()
    goes_on("one")
    with one.standing():
        data = sections.encode(machine_state.capture(one))
        memory = bytes(one.memory.regions[0][1])
        again = sections.encode(machine_state.capture(one))
    assert one.status == RUNNING
    goes_on("one")
    one.pause()
    assert one.status == PAUSED
    one.close()

    stored = sections.decode(data)
    assert set(stored) == set(sections.decode(again))
    assert stored["vcpu/0"] == sections.decode(again)["vcpu/0"]
    moved = machine_state.read_config(stored)
    assert moved == one.config
    out = msgspec.structs.replace(moved.chardevs[0], path=str(tmp_path / "two.out"))
    two = Machine(msgspec.structs.replace(moved, name="two", chardevs=(out,)), endpoint)
    two.start(arriving=True)
    assert two.status == INMIGRATE
    two.memory.regions[0][1][:] = memory
    with two.standing():
        machine_state.restore(two, machine_state.check(two, stored))
    two.resume()
    goes_on("two")
    running = threading.Thread(target=two.wait, daemon=True)
    running.start()
    two.reset()  # it boots, here for the first time: counts from nothing, finds its pages counted, and shuts down
    running.join(60)
    assert not running.is_alive()
    assert two.failure == ""
    assert (tmp_path / "two.out").read_bytes().endswith(b"X")


def test_what_has_changed_since_the_rehearsal_is_restored(endpoint, goes_on, tmp_path: Path) -> None:
    """A machine that has become an earlier state of the VM is told the rest; devices, too."""
    config = memory_guest.config(tmp_path, "one", drives=(memory_guest.drive(tmp_path / "disk"),))
    one = Machine(config, endpoint)
    one.start()
    goes_on("one")
    uart = next(device for device in one.parts.devices if device.name == "uart")
    with one.standing():
        trial = sections.decode(sections.encode(machine_state.capture(one)))
        uart.write(7, 1, 0x5A)  # the scratch register
        last = sections.decode(sections.encode(machine_state.capture(one)))
    one.close()
    out = msgspec.structs.replace(config.chardevs[0], path=str(tmp_path / "two.out"))
    two = Machine(msgspec.structs.replace(config, name="two", chardevs=(out,)), endpoint)
    two.start(arriving=True)
    with two.standing():
        before = machine_state.check(two, trial)
        machine_state.restore(two, before)
        machine_state.restore(two, machine_state.check(two, last, before), before)
        now = sections.decode(sections.encode(machine_state.capture(two)))
    assert [name for name in last if name.startswith("device/") and last[name] != trial[name]] == ["device/uart"]
    assert all(now[name] == last[name] for name in last if name.startswith("device/"))
    two.close()


def test_what_does_not_fit_is_refused_before_anything_changes(endpoint, tmp_path: Path) -> None:
    one = Machine(memory_guest.config(tmp_path, "small"), endpoint)
    one.start(arriving=True)
    two = Machine(memory_guest.config(tmp_path, "large", cpus=2), endpoint)
    two.start(arriving=True)
    try:
        with one.standing(), two.standing():
            of_one = sections.decode(sections.encode(machine_state.capture(one)))
            of_two = sections.decode(sections.encode(machine_state.capture(two)))
            with pytest.raises(StateError, match="vcpu/1 is missing"):
                machine_state.check(two, of_one)
            with pytest.raises(StateError, match=r"vcpu/1|IMSICs"):
                machine_state.check(one, of_two)
            broken = dict(of_one)
            broken["device/uart"] = broken["device/rtc"]
            with pytest.raises(StateError, match="Ns16550a"):
                machine_state.check(one, broken)
            machine_state.check(one, of_one)
    finally:
        one.close()
        two.close()


def test_the_interrupts_of_a_machine_that_has_arrived_are_told_at_once(endpoint, tmp_path: Path) -> None:
    """Not a message for each vector that fires for the first time."""
    drives = tuple(memory_guest.drive(tmp_path / f"disk{number}") for number in range(3))
    machine = Machine(memory_guest.config(tmp_path, "pci", drives=drives), endpoint)
    machine.start(arriving=True)
    try:
        functions = [device for device in machine.parts.devices if isinstance(device, VirtioPci)]
        assert len(functions) >= 3
        for number, function in enumerate(functions):
            assert function.msix is not None
            for at, value in ((0, virt.PLACES["imsic"].base), (8, 1 + number), (12, 0)):
                function.msix.write_table(ENTRY_SIZE + at, 4, value)
            function.msix.control(ENABLE, live=True)
            function._vectors[1] = 1
            queue = function.virtio.queues[0]
            queue.descriptors, queue.available, queue.used = (
                virt.RAM_BASE + 0x10000 * (1 + number) + 0x4000 * ring for ring in range(3)
            )
            queue.enable(machine.memory)
            queue.moved(0, 1, 1)  # something has been given back
        told = []
        routing = machine.vm.set_gsi_routing
        machine.vm.set_gsi_routing = lambda table: told.append(len(table)) or routing(table)
        pins = len(machine.interrupts._routes._table)
        machine.resume()
        assert told == [pins + len(functions)]
        for function in functions:
            function.msix.fire(1)
        assert len(told) == 1
    finally:
        machine.close()
