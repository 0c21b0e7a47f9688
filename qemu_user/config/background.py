"""What becomes of a configuration when its VM goes on without the terminal that started it."""

from __future__ import annotations

import msgspec

from qemu_user.config.machine_config import Chardev, MachineConfig


def for_background(config: MachineConfig, name: str) -> MachineConfig:
    """The same machine without our terminal and descriptors: consoles are attached to with `softkvm console`."""
    chardevs = []
    for chardev in config.chardevs:
        if chardev.kind in ("stdio", "hub"):
            chardevs.append(Chardev(id=chardev.id, kind="hub"))
        elif chardev.kind == "fd":
            chardevs.append(Chardev(id=chardev.id, kind="null"))
        else:
            chardevs.append(chardev)
    return msgspec.structs.replace(config, name=name, chardevs=tuple(chardevs), qmp=())
