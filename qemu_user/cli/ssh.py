"""`softkvm ssh [USER@]NAME [COMMAND]`: a shell or a command in a VM, by the host's ssh client over vsock: the VM needs no
network, the host no free port. The key is softkvm's own, made when it is first needed; VMs of images with a disk trust it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

USAGE = """usage: softkvm ssh [SSH OPTIONS] [USER@]NAME [COMMAND ...]

Log in to a VM, or run COMMAND in it. Options are those of ssh(1), such as -t, -L 8080:localhost:80 or -N. USER is by default
the one of `softkvm run --user`, else root. Waits up to 300 s for a VM that is not up yet.
"""
WAIT_SECONDS = 300
MISSING = "there is no ssh client: {name} is not installed (Debian, Ubuntu: apt install openssh-client; Fedora: dnf install " \
          "openssh-clients); softkvm console NAME needs none"  # fmt: skip
#: Options of ssh(1) that have a value.
_VALUED = "BbcDEeFIiJLlmOopQRSWw"


def main(arguments: list[str]) -> int:
    """The exit status of ssh: the command's, 255 when it cannot connect; 1 when there is no such VM."""
    from qemu_user.cli.vm import VerbError, fail

    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        raise SystemExit(0 if arguments else 2)
    at = 0
    while at < len(arguments) and arguments[at].startswith("-"):
        valued = len(arguments[at]) == 2 and arguments[at][1] in _VALUED
        at += 2 if valued else 1
    if at >= len(arguments):
        sys.stderr.write(USAGE)
        return 2
    user, _, name = arguments[at].rpartition("@")
    try:
        words = [program("ssh"), *options(name, user), *arguments[:at], name, *arguments[at + 1 :]]
    except VerbError as error:
        return fail("ssh", error)
    os.execv(words[0], words)


def program(name: str) -> str:
    """The host's program. VerbError: it is not installed."""
    from qemu_user.cli.vm import VerbError

    found = shutil.which(name)
    if found is None:
        raise VerbError(MISSING.format(name=name))
    return found


def options(name: str, user: str = "") -> list[str]:
    """Options for ssh and scp with which the host called `name` is the VM of that name. VerbError."""
    from qemu_user.cli.vm import VerbError
    from qemu_user.management.registry import find

    entry = find(name)
    if entry is None:
        raise VerbError(f"no VM {name!r} is running; softkvm ps lists them")
    sock = entry.directory / "vsock.sock"
    if not sock.exists():
        raise VerbError(f"VM {name}: cannot be reached by ssh: it has no vsock device; VMs of the image debian have one")
    proxy = [sys.executable, "-P", "-m", "qemu_user.cli.ssh_proxy", str(sock), str(WAIT_SECONDS)]
    settings = {
        "ProxyCommand": shlex.join(proxy).replace("%", "%%"), "ProxyUseFdpass": "yes", "User": user or entry.login,
        # The way to the VM is a socket in a directory that only we may enter; its host key says nothing more.
        "StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "GlobalKnownHostsFile": "/dev/null",
        "LogLevel": "ERROR", "IdentitiesOnly": "yes", "IdentityFile": f'"{key()}"', "PasswordAuthentication": "no",
    }  # fmt: skip
    return ["-F", "none", *(word for setting, value in settings.items() for word in ("-o", f"{setting}={value}"))]


def key() -> Path:
    """softkvm's own private key, made if there is none. VerbError."""
    from qemu_user.cli.vm import VerbError

    value = os.environ.get("XDG_DATA_HOME", "")
    folder = (Path(value) if os.path.isabs(value) else Path.home() / ".local/share") / "softkvm" / "ssh"
    path = folder / "id_ed25519"
    if path.exists():
        return path
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = folder / f".new-{os.getpid()}"
        subprocess.run(
            [program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", "softkvm", "-f", str(new)],
            check=True, capture_output=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        os.replace(f"{new}.pub", f"{path}.pub")
        os.replace(new, path)
    except (OSError, subprocess.CalledProcessError) as error:
        raise VerbError(f"cannot make a key for ssh in {folder}: {error}") from error
    return path
