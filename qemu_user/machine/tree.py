"""The device tree that the guest is given: the machine's own nodes around those of the devices.

Called by machine/machine.py at start and reset; machine/fdt.py makes the bytes.
"""

from __future__ import annotations

import os

from qemu_user.devices.device import FdtNode, PropertyValue
from qemu_user.devices.syscon import PASS, RESET
from qemu_user.machine import virt
from qemu_user.machine.cpu import Isa, cpu_nodes
from qemu_user.machine.fdt import cells64
from qemu_user.machine.irq import PHANDLE_CONTROLLER, PHANDLE_TEST


def machine_tree(
    cpus: int, isa: Isa, memory: int, nodes: list[FdtNode], append: str, initrd: tuple[int, int]
) -> FdtNode:
    """The root node. `memory`: bytes of RAM; `initrd`: (start, end), (0, 0) for none."""
    serial = virt.PLACES["uart"].base
    chosen: dict[str, PropertyValue] = {
        "stdout-path": f"/soc/serial@{serial:x}",
        "rng-seed": os.getrandom(32),
    }
    if append:
        chosen["bootargs"] = append
    if initrd[1]:
        chosen["linux,initrd-start"] = cells64(initrd[0])
        chosen["linux,initrd-end"] = cells64(initrd[1])
    power: dict[str, PropertyValue] = {
        "compatible": "syscon-poweroff",
        "regmap": PHANDLE_TEST,
        "offset": 0,
        "value": PASS,
    }
    reboot: dict[str, PropertyValue] = {
        "compatible": "syscon-reboot",
        "regmap": PHANDLE_TEST,
        "offset": 0,
        "value": RESET,
    }
    soc = FdtNode(
        "soc",
        {
            "compatible": "simple-bus",
            "#address-cells": 2,
            "#size-cells": 2,
            "ranges": True,
            "interrupt-parent": PHANDLE_CONTROLLER,
        },
        sorted(nodes, key=lambda node: int(node.name.partition("@")[2], 16)),
    )
    return FdtNode(
        "",
        {
            "#address-cells": 2,
            "#size-cells": 2,
            "compatible": "riscv-virtio",
            "model": "riscv-virtio,softkvm",
        },
        [
            FdtNode("chosen", chosen),
            FdtNode("aliases", {"serial0": f"/soc/serial@{serial:x}"}),
            cpu_nodes(cpus, isa),
            FdtNode(
                f"memory@{virt.RAM_BASE:x}",
                {"device_type": "memory", "reg": [*cells64(virt.RAM_BASE), *cells64(memory)]},
            ),
            FdtNode("poweroff", power),
            FdtNode("reboot", reboot),
            soc,
        ],
    )
