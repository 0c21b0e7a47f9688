"""`python -m kvmcore`: the host daemon alone.

Parses the command line, takes the listening socket, forks the zygote, and only then imports what is heavy (ZeroMQ): a
client may connect some milliseconds after the start. Messages say what is wrong and what to do; exit status 2 for
usage, 1 when it cannot listen.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvmcore.server import runtime_dir
from kvmcore.vm.accelerator import ACCELERATORS, TRANSLATOR
from protocol.abi.compat import Compat
from protocol.channel import fd_passing

if TYPE_CHECKING:
    from kvmcore.server.remote import Remote

_DESCRIPTION = """\
The kvmcore daemon: KVM for RISC-V guests, as ordinary processes. Clients (softkvm run, python -m qemu_user) speak the
Linux KVM UAPI to it over the socket; every VM gets a process of its own, called "kvmcore-vm NAME" in ps. The daemon
serves its own user only. It ends, and all VMs with it, on SIGTERM or Ctrl-C."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m kvmcore", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--listen",
        metavar="ENDPOINT",
        action="append",
        default=[],
        help=f"ipc:///path/to/socket (default: {runtime_dir.default_endpoint()}), and tcp://ADDRESS:PORT as well",
    )
    made.add_argument("--key", metavar="FILE", type=Path, help="our secret key, for tcp (default: softkvm host keys shows it)")
    made.add_argument("--peers", metavar="DIR", type=Path, help="public keys that may come in over tcp (default: keys/peers)")
    made.add_argument(
        "--idle-timeout",
        metavar="SECONDS",
        type=float,
        default=0.0,
        help="exit when no client and no VM has been there for so long (default: stay)",
    )
    made.add_argument(
        "--compat",
        choices=[compat.value for compat in Compat],
        default=Compat.DEFAULT.value,
        help="whose behaviour sessions see that do not ask for one themselves: Linux's with our extensions"
        " (default), without them (strict), or exactly that of a kernel version",
    )
    made.add_argument(
        "--accel",
        choices=ACCELERATORS,
        default=TRANSLATOR,
        help="how vCPUs run: interpreter plus translator (default), interpreter alone, or the slow reference",
    )
    made.add_argument("--ready-fd", metavar="FD", type=int, default=-1, help="write 'ready' to FD when listening")
    made.add_argument(
        "--coverage",
        metavar="FILE",
        help="for fuzzers: mark in FILE, as large as it is, which lines have run (slow)",
    )
    made.add_argument("-v", "--verbose", action="store_true", help="log sessions and VMs as they come and go")
    return made


def _endpoints(given: list[str]) -> tuple[str, str]:
    """(path of the Unix socket, tcp endpoint or ""); SystemExit(2) with a message for anything else."""
    paths = [endpoint.removeprefix("ipc://") for endpoint in given if endpoint.startswith("ipc://")]
    remote = [endpoint for endpoint in given if endpoint.startswith("tcp://")]
    for endpoint in given:
        scheme, separator, rest = endpoint.partition("://")
        port = rest.rpartition(":")[2]
        if scheme not in ("ipc", "tcp") or not separator or not rest or (scheme == "tcp" and not port.isdigit()):
            parser().error(f"--listen {endpoint}: give ipc:///path/to/socket or tcp://ADDRESS:PORT")
    if len(paths) > 1 or len(remote) > 1:
        parser().error("--listen: one ipc:// and one tcp:// endpoint at most")
    return (paths or [runtime_dir.default_endpoint().removeprefix("ipc://")])[0], "".join(remote)


def _remote(endpoint: str, arguments: argparse.Namespace) -> Remote:
    """Keys for tcp. KeyFileError; SystemExit(2) if nobody could come in."""
    from kvmcore.server.remote import Remote
    from protocol.channel import keys

    peers = keys.trusted(arguments.peers)
    if not peers:
        where = arguments.peers or keys.folder() / "peers"
        parser().error(f"--listen {endpoint}: no public key in {where}, so nobody could connect")
    return Remote(endpoint, keys.own(arguments.key), frozenset(key.decode() for key in peers.values()))


def main() -> int:
    """Run the daemon; the exit status."""
    arguments = parser().parse_args()
    logging.basicConfig(
        format="%(asctime)s %(name)s[%(process)d]: %(message)s",
        level=logging.INFO if arguments.verbose else logging.WARNING,
    )
    path, tcp = _endpoints(arguments.listen)
    try:
        listener = runtime_dir.listen(path)
        private = runtime_dir.PrivateDirectory(path)
    except (runtime_dir.AlreadyRunning, runtime_dir.BadPath) as error:
        print(f"kvmcore: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"kvmcore: cannot listen on {path}: {error.strerror or error}", file=sys.stderr)
        return 1

    from kvmcore.server.daemon import Daemon, Options, start_zygote

    if arguments.coverage:
        from kvmcore.server import coverage

        coverage.start(arguments.coverage)

    ours, theirs = fd_passing.pair()

    def drop_ours() -> None:
        ours.close()
        listener.close()

    gc.freeze()
    start_zygote(theirs, private, path, drop_ours)
    theirs.close()
    from protocol.channel.keys import KeyFileError  # ZeroMQ, so only after the fork

    try:
        remote = _remote(tcp, arguments) if tcp else None
        options = Options(
            path, Compat(arguments.compat), arguments.accel, arguments.idle_timeout, arguments.ready_fd, remote
        )
        daemon = Daemon(options, listener, private, ours)
    except KeyFileError as error:
        print(f"kvmcore: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # zmq.ZMQError is one
        print(f"kvmcore: cannot listen on {tcp or path}: {error.strerror or error}", file=sys.stderr)
        return 1
    daemon.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
