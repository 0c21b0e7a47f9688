"""Records golden/FORMAT.state: the state of a machine on which Linux has set every device up. By hand, once per released
version: `.venv/bin/python -m tests.migration.record_golden NAME`. Recorded files are never changed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import msgspec

from qemu_user.config.machine_config import Boot, Chardev, ConsolePort, Drive, MachineConfig, Net
from qemu_user.images.store import Store, settings
from qemu_user.machine.machine import Machine
from qemu_user.migration import machine_state, sections
from tests.framework.full_stack import Daemon

FOLDER = Path(__file__).parent / "golden"


def config(folder: Path) -> MachineConfig:
    """A machine with one of each device; its disk is made in `folder`."""
    disk = folder / "disk"
    disk.write_bytes(bytes(1 << 20))
    hub = Chardev(id="console", kind="hub")
    return MachineConfig(
        name="golden", uuid="6ee2d1c0-3c42-4a39-9a3e-2a6d1f9f5f10", memory=128 << 20, cpus=2,
        drives=(Drive(file=str(disk)),), nets=(Net(id="net0", kind="none", mac="52:54:00:12:34:56"),), chardevs=(hub,),
        ports=(ConsolePort(id=1, name="org.example.port", chardev="console"),),
    )  # fmt: skip


def main() -> None:
    """Boot, wait, record."""
    image = Store().ensure("busybox", lambda *_: None)
    sections.zstandard = None  # type: ignore[assignment]  # plain sections: whoever reads it needs no wheel
    with tempfile.TemporaryDirectory() as name, Daemon() as daemon:
        conf = settings({"NAME": "golden", "COMMAND": "sleep 1000", "TTY": "1"})
        boot = Boot(kernel=str(image.kernel), initrd=str(image.initrd), initrd_extra=conf, append=image.append)
        machine = Machine(msgspec.structs.replace(config(Path(name)), boot=boot), daemon.endpoint)
        machine.start()
        time.sleep(8)
        with machine.standing():
            parts = machine_state.capture(machine)
        machine.close()
        plain = msgspec.structs.replace(machine.config, boot=Boot(kernel="kernel"), drives=(Drive(file="disk"),))
        parts = [machine_state.config_section(plain) if part.name == "config" else part for part in parts]
        (FOLDER / f"{sys.argv[1]}.state").write_bytes(sections.encode(parts))


if __name__ == "__main__":
    main()
