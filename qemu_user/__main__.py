"""`python -m qemu_user`: one VM on a kvmcore daemon, QEMU's option names. `softkvm run` is the comfortable
way.

Exit status: the guest's (0 when it shut down), 1 when the VM failed or could not start, 2 for a wrong command
line.
"""

from __future__ import annotations

import os
import signal
import sys

from qemu_user.config.errors import ConfigError
from qemu_user.config.qemu_options import built


def main(argv: list[str]) -> int:
    """Run a VM to its end."""
    try:
        builder = built(argv)
        config, endpoint, process = builder.finish(), builder.endpoint, builder.process
        from qemu_user import cgroup

        limits = cgroup.parse(process.cgroup) if process.cgroup else None
    except ConfigError as error:
        sys.stderr.write(f"qemu_user: {error}\n")
        return 2
    from qemu_user.confinement import confine, only_files
    from qemu_user.machine.machine import StartError
    from qemu_user.management.instance import Instance
    from qemu_user.management.registry import runtime_directory

    endpoint = endpoint or os.environ.get("SOFTKVM_ENDPOINT", f"ipc://{runtime_directory() / 'kvmcore.sock'}")
    group: cgroup.VmCgroup | None = None
    try:
        if limits is not None:
            group = cgroup.VmCgroup(config.name, limits, kept=process.only_files)
        if process.only_files:
            only_files(config, process.allow_files)
        instance = Instance(config, endpoint)
        if group is not None:
            instance.machine.vm_made = group.add
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda received, frame: instance.quit(128 + received))
        signal.signal(signal.SIGWINCH, lambda received, frame: instance.machine.window_changed())
        instance.start()
        if lack := confine(instance.config):
            sys.stderr.write(f"qemu_user: {lack}\n")
        return instance.wait()
    except (ConfigError, StartError, cgroup.CgroupError) as error:
        sys.stderr.write(f"qemu_user: {error}\n")
        return 1
    finally:
        if group is not None:
            group.remove()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
