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

from kvmcore.server import runtime_dir
from kvmcore.vm.accelerator import ACCELERATORS, TRANSLATOR
from protocol.abi.compat import Compat
from protocol.channel import fd_passing

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
        help=f"ipc:///path/to/socket (default: {runtime_dir.default_endpoint()})",
    )
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
    made.add_argument("-v", "--verbose", action="store_true", help="log sessions and VMs as they come and go")
    return made


def _path_of(endpoint: str) -> str:
    """The path in ipc://PATH; SystemExit(2) with a message otherwise."""
    scheme, separator, path = endpoint.partition("://")
    if scheme != "ipc" or not separator or not path:
        parser().error(f"--listen {endpoint}: give ipc:///path/to/socket")
    return path


def main() -> int:
    """Run the daemon; the exit status."""
    arguments = parser().parse_args()
    logging.basicConfig(
        format="%(asctime)s %(name)s[%(process)d]: %(message)s",
        level=logging.INFO if arguments.verbose else logging.WARNING,
    )
    endpoint = arguments.listen or runtime_dir.default_endpoint()
    path = _path_of(endpoint)
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

    ours, theirs = fd_passing.pair()

    def drop_ours() -> None:
        ours.close()
        listener.close()

    gc.freeze()
    start_zygote(theirs, private, path, drop_ours)
    theirs.close()
    options = Options(
        path, Compat(arguments.compat), arguments.accel, arguments.idle_timeout, arguments.ready_fd
    )
    Daemon(options, listener, private, ours).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
