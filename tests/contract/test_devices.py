"""The contract of qemu_user/devices/device.py, over every device: a new one gets these tests by its line
in the list.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qemu_user.devices.catalogue import DEVICES
from qemu_user.devices.device import Device, Place, StateError, decode_state, encode_state
from qemu_user.devices.virtio.catalogue import DEVICES as VIRTIO_DEVICES
from qemu_user.devices.virtio.mmio import VirtioMmio
from qemu_user.machine.fdt import FdtNode, flatten
from tests.framework.devices import BUILDERS, Bench

NAMES = sorted(BUILDERS)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_every_device_is_built_here() -> None:
    assert set(DEVICES) | {f"virtio-{name}" for name in VIRTIO_DEVICES} == set(NAMES)


def _exercise(device: Device, seed: int, rounds: int = 4000) -> None:
    """Random accesses, most of them to registers that exist, and for virtio a device brought up first."""
    choice = random.Random(seed)
    spots = [
        *range(0, 0x200, 4),
        *range(0x1000, 0x1010, 4),
        *range(0x2000, 0x2100, 4),
        0x200000,
        0x200004,
        0x201004,
    ]
    for _ in range(rounds):
        size = choice.choice((1, 2, 4, 4, 4, 8))
        offset = choice.choice(spots) if choice.random() < 0.9 else choice.randrange(device.region_size)
        offset = min(offset, device.region_size - size)
        if choice.random() < 0.5:
            value = device.read(offset, size)
            assert 0 <= value < 1 << 8 * size
        else:
            value = choice.choice((0, 1, 2, 7, 0xFF, 0x80000000, choice.getrandbits(64), choice.getrandbits(10)))
            device.write(offset, size, value)


def _prepare(name: str, bench: Bench, seed: int) -> Device:
    device = BUILDERS[name](bench)
    if isinstance(device, VirtioMmio) and device.virtio is not None and seed % 2:
        bench.driver(device).start()
    _exercise(device, seed)
    return device


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NAMES)
def test_random_accesses_never_raise(name: str, seed: int, bench: Bench) -> None:
    _prepare(name, bench, seed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NAMES)
def test_save_bytes_restore_save_is_the_identity(name: str, seed: int, bench: Bench, tmp_path: Path) -> None:
    device = _prepare(name, bench, seed)
    state = device.save()
    data = encode_state(state)
    assert device.save() == state, "save() has side effects"
    other = BUILDERS[name](bench)
    other.restore(decode_state(type(other).State, data))
    assert encode_state(other.save()) == data


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_reset_is_as_fresh(name: str, seed: int, bench: Bench) -> None:
    fresh = encode_state(BUILDERS[name](bench).save())
    device = _prepare(name, bench, seed)
    device.reset()
    assert encode_state(device.save()) == fresh
    assert not bench.line.level
    assert not any(bench.outputs.values())


def _mutations(plain: Any, choice: random.Random) -> Any:
    """A copy of a state with one thing wrong or strange in it."""
    bad = [-1, 1 << 16, 1 << 33, (1 << 64) - 1, "x", None, [], {}, True, b"\0" * 70000, 3.5]
    if isinstance(plain, dict) and plain:
        key = choice.choice(sorted(plain))
        if choice.random() < 0.1:
            return {k: v for k, v in plain.items() if k != key}
        if choice.random() < 0.05:
            return {**plain, "surprise": 1}
        return {**plain, key: _mutations(plain[key], choice)}
    if isinstance(plain, list) and plain and choice.random() < 0.8:
        index = choice.randrange(len(plain))
        copy = list(plain)
        if choice.random() < 0.2:
            return copy * choice.randrange(2, 40)
        copy[index] = _mutations(copy[index], choice)
        return copy
    return choice.choice(bad)


def _restores(device: Device, data: bytes) -> bool:
    """Whether the device takes these bytes for its state; nothing but StateError may refuse them."""
    try:
        device.restore(decode_state(type(device).State, data))
    except StateError:
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_hostile_states_are_refused_or_harmless(name: str, bench: Bench) -> None:
    device = _prepare(name, bench, 1)
    plain = msgspec.msgpack.decode(encode_state(device.save()))
    choice = random.Random(7)
    refused = 0
    for _ in range(300):
        data = msgspec.msgpack.encode(_mutations(plain, choice))
        before = encode_state(device.save())
        if not _restores(device, data):
            refused += 1
            assert encode_state(device.save()) == before, "a refused state changed the device"
        _exercise(device, 3, 20)
    assert refused > 50


@pytest.mark.parametrize("name", NAMES)
def test_hostile_bytes_are_refused(name: str, bench: Bench) -> None:
    device = BUILDERS[name](bench)
    data = encode_state(device.save())
    choice = random.Random(11)
    for _ in range(200):
        broken = bytearray(data[: choice.randrange(len(data) + 1)])
        if broken and choice.random() < 0.7:
            broken[choice.randrange(len(broken))] = choice.randrange(256)
        _restores(device, bytes(broken))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "virtio_pci"])
@pytest.mark.skipif(shutil.which("dtc") is None, reason="needs dtc (apt install device-tree-compiler)")
def test_tree_node_is_clean_under_dtc(name: str, bench: Bench) -> None:
    device = BUILDERS[name](bench)
    place = Place(0x1000_0000, type(device).region_size, [] if name in ("plic", "syscon", "pflash") else [1], 1, 3)
    controller = {
        "compatible": "sifive,plic-1.0.0",
        "phandle": 1,
        "interrupt-controller": True,
        "#interrupt-cells": 1,
        "#address-cells": 0,
        "reg": [0, 0xC000000, 0, 0x1000],
    }
    second = {**controller, "phandle": 2, "reg": [0, 0xD000000, 0, 0x1000]}
    root = FdtNode(
        "",
        {"compatible": "riscv-virtio", "model": "test", "#address-cells": 2, "#size-cells": 2},
        [
            FdtNode(
                "soc",
                {"compatible": "simple-bus", "#address-cells": 2, "#size-cells": 2, "ranges": True},
                [
                    FdtNode("interrupt-controller@c000000", controller),
                    FdtNode("interrupt-controller@d000000", second),
                    device.fdt_node(place),
                ],
            )
        ],
    )
    done = subprocess.run(["dtc", "-I", "dtb", "-O", "dts", "-"], input=flatten(root), capture_output=True, check=True)
    assert done.stderr == b"", done.stderr.decode()
    assert done.stdout.startswith(b"/dts-v1/")
