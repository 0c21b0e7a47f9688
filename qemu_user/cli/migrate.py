"""`softkvm migrate NAME ipc://PATH|tcp://HOST:PORT`: hand a VM over to another host, while it runs."""

from __future__ import annotations

import argparse
import sys

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


def main(arguments: list[str]) -> int:
    """0 when it runs there; 1 when it goes on here."""
    from protocol.channel import keys
    from qemu_user.cli.vm import Ended, VerbError, connect, fail, on, wait_for_job

    parser = argparse.ArgumentParser(prog="softkvm migrate", description="Hand a VM over to another host, while it runs.")
    parser.add_argument("name")
    parser.add_argument("uri", help="where `softkvm host serve` listens")
    parser.add_argument("--max-downtime", default="30ms", metavar="TIME", help="how long the guest may stand (default: 30ms)")
    parser.add_argument("--bandwidth", default="0", metavar="BYTES", help="per second, with k, M or G (default: no limit)")
    parser.add_argument("--with-disks", action="store_true", help="copy writable disks too (default: both hosts see them)")
    parser.add_argument("--postcopy", action="store_true", help="switch over after one round; what is missing follows")
    parser.add_argument("--copy", action="store_true", help="copy memory even on one machine, where it could be given")
    parser.add_argument("--channels", type=int, default=1, metavar="N", help="connections that memory goes over (default: 1)")
    parser.add_argument("--key", default="", metavar="FILE", help="our secret key (default: made when first needed)")
    parser.add_argument("--peer-key", default="", metavar="FILE", help="the host's public key (default: keys/peers/HOST.key)")
    options = parser.parse_args(arguments)
    try:
        downtime, bandwidth = milliseconds(options.max_downtime), int(amount(options.bandwidth))
    except ValueError as error:
        parser.error(str(error))
    peer = options.peer_key
    if options.uri.startswith("tcp://") and not peer:
        peer = str(keys.folder() / "peers" / f"{options.uri.removeprefix('tcp://').rpartition(':')[0]}.key")
    try:
        with connect(options.name) as client:
            on(
                client, options.name, "migrate", uri=options.uri, max_downtime=downtime, bandwidth=bandwidth,
                with_disks=options.with_disks, copy=options.copy, postcopy=options.postcopy, channels=options.channels,
                key=options.key, peer_key=peer,
            )  # fmt: skip
            numbers = wait_for_job(client, options.name, "migration")
    except Ended as error:
        return _send_what_is_left(options.name) if options.postcopy else fail("migrate", error)
    except VerbError as error:
        return fail("migrate", error)
    ram = numbers["ram"]
    sys.stderr.write(
        f"softkvm: {numbers['result']}: the guest stood {numbers['downtime']} ms; {numbers['total-time']} ms in all, "
        f"{ram['dirty-sync-count']} rounds, {ram['transferred'] / 1e6:.1f} MB\n"
    )
    return 0


def _send_what_is_left(name: str) -> int:
    """The VM's device process has ended while it moved. If it was killed when the VM was at the other host already, another one
    sends the memory that is still here. 0 when it has."""
    import json

    from qemu_user.cli.vm import Ended, VerbError, connect, fail, wait_for_job
    from qemu_user.management.registry import find
    from qemu_user.migration.spawn import SpawnError, spawn

    attached = False
    while (entry := find(name)) is not None:
        try:
            if entry.waits:
                spawn(json.dumps({"type": "Attach", "directory": str(entry.directory), "gone": True}).encode(), name)
                attached = True
                sys.stderr.write(f"softkvm: VM {name}: its process here was killed; another one sends the rest of its memory\n")
            with connect(name) as client:
                wait_for_job(client, name, "migration")
            break
        except Ended:
            continue
        except (SpawnError, VerbError) as error:
            return fail("migrate", error)
    return 0 if attached else fail("migrate", VerbError(f"VM {name}: ended meanwhile"))


def milliseconds(text: str) -> float:
    """30ms, 0.3s, 30 -> 30, 300, 30. ValueError."""
    number, factor = (text[:-2], 1.0) if text.endswith("ms") else (text[:-1], 1000.0) if text.endswith("s") else (text, 1.0)
    try:
        return float(number) * factor
    except ValueError:
        raise ValueError(f"{text}: expected a time like 30ms or 0.3s") from None


def amount(text: str) -> float:
    """500M -> 5e8. ValueError."""
    unit = text[-1:].lower() if text[-1:].isalpha() else ""
    try:
        return float(text.removesuffix(text[-1:]) if unit else text) * _UNITS[unit]
    except (ValueError, KeyError):
        raise ValueError(f"{text}: expected a number with k, M or G") from None
