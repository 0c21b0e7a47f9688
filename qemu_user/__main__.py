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
from qemu_user.config.qemu_options import parse


def main(argv: list[str]) -> int:
    """Run a VM to its end."""
    try:
        config, endpoint = parse(argv)
    except ConfigError as error:
        sys.stderr.write(f"qemu_user: {error}\n")
        return 2
    from qemu_user.confinement import confine
    from qemu_user.machine.machine import StartError
    from qemu_user.management.instance import Instance
    from qemu_user.management.registry import runtime_directory

    endpoint = endpoint or os.environ.get("SOFTKVM_ENDPOINT", f"ipc://{runtime_directory() / 'kvmcore.sock'}")
    try:
        instance = Instance(config, endpoint)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda received, frame: instance.quit(128 + received))
        signal.signal(signal.SIGWINCH, lambda received, frame: instance.machine.window_changed())
        instance.start()
        if lack := confine(instance.config):
            sys.stderr.write(f"qemu_user: {lack}\n")
        return instance.wait()
    except StartError as error:
        sys.stderr.write(f"qemu_user: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
