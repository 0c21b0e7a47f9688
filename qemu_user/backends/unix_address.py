"""A Unix socket at a path of the file system, for its owner only."""

from __future__ import annotations

import errno
import os
import socket

from qemu_user.backends.errors import BackendBusy, BackendError


def bind_unix(path: str, what: str, kind: socket.SocketKind = socket.SOCK_DGRAM) -> socket.socket:
    """A socket bound to `path`; one there that nobody has open any more is replaced. BackendBusy when somebody has it,
    BackendError.
    """
    sock = socket.socket(socket.AF_UNIX, kind)
    before = os.umask(0o177)
    try:
        with socket.socket(socket.AF_UNIX, kind) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            except OSError:
                pass
        sock.bind(path)
        if kind == socket.SOCK_STREAM:
            sock.listen(8)
    except OSError as error:
        sock.close()
        refusal = BackendBusy if error.errno == errno.EADDRINUSE else BackendError
        doing = "listen on" if kind == socket.SOCK_STREAM else "bind"
        raise refusal(f"{what}: cannot {doing} {path}: {error.strerror or error}") from error
    finally:
        os.umask(before)
    return sock


def listen_unix(path: str, what: str) -> socket.socket:
    """A listening stream socket at `path`, as bind_unix()."""
    return bind_unix(path, what, socket.SOCK_STREAM)
