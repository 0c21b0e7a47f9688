"""`softkvm host serve` takes VMs in; `softkvm host keys` shows the key that others need; `softkvm host settle` decides for a
VM whose source on another machine died in the middle of the hand-over.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """0; 1 when it cannot be done."""
    parser = argparse.ArgumentParser(prog="softkvm host", description="Be a host that VMs are handed over to.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    serve = verbs.add_parser("serve", help="listen for VMs until Ctrl-C")
    serve.add_argument("--listen", metavar="URI", help="ipc://PATH (default: in the runtime directory) or tcp://ADDRESS:PORT")
    serve.add_argument("--key", metavar="FILE", help="our secret key, for tcp (default: made when first needed)")
    serve.add_argument("--peers", metavar="DIR", help="public keys of hosts that may send VMs (default: keys/peers)")
    serve.add_argument("--disks", default="", metavar="DIR", help="where disks are put that travel along")
    verbs.add_parser("keys", help="show our public key file, made if there is none, and the peers'")
    settle = verbs.add_parser("settle", help="decide for a VM in doubt")
    settle.add_argument("uuid")
    settle.add_argument("what", choices=("run", "forget"))
    options = parser.parse_args(arguments)
    return {"serve": _serve, "keys": _keys, "settle": _settle}[options.verb](options)


def _serve(options: argparse.Namespace) -> int:
    from protocol.channel import keys
    from qemu_user.cli.vm import fail
    from qemu_user.management.registry import made_runtime_directory
    from qemu_user.migration.host import Host, HostError, default_listen

    listen = options.listen or default_listen(made_runtime_directory())
    try:
        key, peers = None, {}
        if listen.startswith("tcp://"):
            key = keys.own(Path(options.key) if options.key else None)
            folder = Path(options.peers) if options.peers else keys.folder() / "peers"
            peers = keys.trusted(folder)
            if not peers:
                raise HostError(f"nobody may send VMs: {folder} has no public key (HOST.key) of a host that may")
        disks = os.path.abspath(options.disks) if options.disks else ""
        host = Host(listen, os.environ.get("SOFTKVM_ENDPOINT", ""), disks, key, list(peers.values()))
    except (HostError, keys.KeyFileError) as error:
        return fail("host", error)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: host.stop())
    sys.stderr.write(f"softkvm: takes VMs at {host.listen}\n")
    sys.stderr.flush()
    host.serve()
    host.close()
    return 0


def _keys(options: argparse.Namespace) -> int:
    from protocol.channel import keys
    from qemu_user.cli.vm import fail

    try:
        own = keys.own()
        sys.stdout.write(f"{keys.folder() / 'host.key'}  {own.public.decode()}\n")
        for name, key in keys.trusted().items():
            sys.stdout.write(f"{keys.folder() / 'peers' / name}.key  {key.decode()}\n")
    except keys.KeyFileError as error:
        return fail("host", error)
    return 0


def _settle(options: argparse.Namespace) -> int:
    from qemu_user.cli.vm import VerbError, fail
    from qemu_user.migration.journal import settle

    try:
        settle(options.uuid, options.what == "run")
    except LookupError:
        return fail("host", VerbError(f"no VM with the uuid {options.uuid} is in doubt here"))
    return 0
