"""What ssh calls (ProxyCommand, ProxyUseFdpass) to reach a VM's sshd over vsock: `python -m qemu_user.cli.ssh_proxy SOCKET
SECONDS` connects to the guest's port 22, waits while the guest is not up yet, hands the connection to ssh, and ends.
"""

from __future__ import annotations

import os
import socket
import sys
import time

SSH_PORT = 22
_PAUSE = 0.1


def connect(path: str, seconds: float) -> socket.socket:
    """A connection to the guest's sshd. OSError: the VM is gone, or does not answer for so long."""
    until = time.monotonic() + seconds
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(path)
        sock.settimeout(max(0.1, until - time.monotonic()))
        try:
            sock.sendall(b"CONNECT %d\n" % SSH_PORT)
            answer = b""
            while (byte := sock.recv(1)) and byte != b"\n":
                answer += byte
        except (TimeoutError, ConnectionResetError, BrokenPipeError):
            answer = b""
        if answer.startswith(b"OK"):
            sock.settimeout(None)
            return sock
        sock.close()
        if time.monotonic() > until:
            raise TimeoutError(f"its sshd did not answer within {seconds:g} s")
        time.sleep(_PAUSE)


def main() -> int:
    """0 when ssh has the connection."""
    path, seconds = sys.argv[1], float(sys.argv[2])
    try:
        sock = connect(path, seconds)
    except OSError as error:
        sys.stderr.write(f"softkvm ssh: cannot reach the VM: {error.strerror or error}\n")
        return 1
    with socket.socket(fileno=os.dup(1)) as ssh, sock:
        socket.send_fds(ssh, [b"\0"], [sock.fileno()])
    return 0


if __name__ == "__main__":
    sys.exit(main())
