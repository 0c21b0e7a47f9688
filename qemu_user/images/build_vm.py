"""A throw-away VM that builds: it runs one script in the busybox image with disks at its side, and tells how far it is.

What takes root on a host (mkfs, mount, chown, chroot, another architecture's programs) takes none here. Called by debian.py.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from qemu_user.images.boot_files import KERNEL_OPTIONS
from qemu_user.images.cpio import Archive
from qemu_user.images.errors import ImageError

MEMORY = 1 << 30
_TOLD = 25
"""Lines that are kept for the message when it fails."""


def run(
    kernel: Path, initrd: Path, modules: bytes, files: Archive, script: str, disks: Sequence[tuple[Path, bool]],
    hear: Callable[[str], None],
) -> None:  # fmt: skip
    """Boot, with `files` in the initrd and `disks` (file, readonly) as vda, vdb; run `script`; call `hear` with each line that
    it writes. ImageError when it exits with another status than 0, or the VM ends before it.
    """
    from qemu_user.cli.daemon import DaemonError, ensure
    from qemu_user.config.errors import ConfigError
    from qemu_user.config.machine_config import Boot, Chardev, ConsolePort, Drive, MachineConfig
    from qemu_user.images.store import settings
    from qemu_user.machine.machine import StartError
    from qemu_user.management.instance import Instance

    with contextlib.ExitStack() as stack:
        ends = {}
        for name in ("stdout", "control"):
            readable, ends[name] = os.pipe()
            stack.callback(os.close, ends[name])
            ends[f"{name}-read"] = readable
        conf = {"NAME": "softkvm-build", "COMMAND": f"exec sh -c {_quoted(script)}"}
        config = MachineConfig(
            name=f"build-{os.getpid()}", memory=MEMORY, cpus=1,
            boot=Boot(kernel=str(kernel), initrd=str(initrd), append=KERNEL_OPTIONS,
                      initrd_extra=settings(conf) + modules + files.finish()),
            drives=tuple(Drive(id=f"disk{n}", file=str(file), readonly=readonly, discard=not readonly)
                         for n, (file, readonly) in enumerate(disks)),
            chardevs=(Chardev(id="console", kind="null"), Chardev(id="control", kind="fd", output=ends["control"]),
                      Chardev(id="stdin", kind="null"), Chardev(id="stdout", kind="fd", output=ends["stdout"]),
                      Chardev(id="stderr", kind="fd", output=ends["stdout"])),
            serial="", console="console", no_reboot=True, panic_ends=True,
            ports=tuple(ConsolePort(id=number, name=f"org.softkvm.{name}", chardev=name)
                        for number, name in enumerate(("stdin", "stdout", "stderr", "control"), 1)),
        )  # fmt: skip
        lines: deque[str] = deque(maxlen=_TOLD)
        words: list[str] = []

        def told(line: str) -> None:
            lines.append(line)
            hear(line)

        readers = [
            threading.Thread(target=_read, args=(ends["stdout-read"], told), daemon=True),
            threading.Thread(target=_read, args=(ends["control-read"], words.append), daemon=True),
        ]
        for reader in readers:
            reader.start()
        try:
            instance = Instance(config.validate(), ensure())
            try:
                instance.start()
                instance.wait()
            except BaseException:
                instance.abandon()
                raise
        except (StartError, ConfigError, DaemonError) as error:
            raise ImageError(f"the VM that builds the image cannot be started: {error}") from error
        finally:
            stack.close()
            for reader in readers:
                reader.join()
    if "exit 0" not in words:
        last = "\n  ".join(lines) or "it said nothing"
        raise ImageError(f"the VM that builds the image failed ({words[-1] if words else 'it ended early'}):\n  {last}")


def _read(fd: int, hear: Callable[[str], object]) -> None:
    with os.fdopen(fd, errors="replace") as file:
        for line in file:
            hear(line.rstrip("\n"))


def _quoted(script: str) -> str:
    import shlex

    return shlex.quote(script)
