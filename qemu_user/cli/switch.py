"""`softkvm switch`: a virtual switch that VMs, QEMUs, taps and other hosts' switches are plugged into (docs/networks.md)."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from typing import Any

from qemu_user.config.errors import ConfigError

_READY = "SOFTKVM_READY_FD"
EPILOG = """examples:
  softkvm switch run -d                                  a switch called default, in the background
  softkvm run --netdev switch,id=n0                      a VM on it; vlan=10 puts it into VLAN 10
  softkvm switch run -d lan --port up,tap=tap0           with an interface of the host
  softkvm switch run lan --port q,listen=/tmp/q.sock     with a place for a QEMU (-netdev stream,addr.path=/tmp/q.sock)
  softkvm switch run lan --listen tcp://0.0.0.0:7700     another host's: --link tcp://HOST:7700
  softkvm switch capture default /tmp/x.pcapng           until Ctrl-C; tshark and Wireshark read it

settings of ports: vlan=N | trunk=all|10:20-30,native=N|none, isolated=on, rate-in=100mbit, rate-out=, burst=
"""


def main(arguments: list[str]) -> int:
    """0; 1 when it cannot be done."""
    parser = argparse.ArgumentParser(
        prog="softkvm switch", description="A virtual switch.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="be a switch until Ctrl-C")
    run.add_argument("name", nargs="?", default="default")
    run.add_argument("-d", "--detach", action="store_true", help="run in the background")
    run.add_argument("--port", action="append", default=[], metavar="NAME,...", help="tap=IF, listen=PATH, connect=PATH, ..")
    run.add_argument("--default", default="", metavar="SETTINGS", help="settings of ports that say nothing (vlan=1)")
    run.add_argument("--listen", default="", metavar="URI", help="where other switches may call: tcp://ADDRESS:PORT, ipc://PATH")
    run.add_argument("--link", action="append", default=[], metavar="URI[,..]", help="another switch to call; peer-key=FILE")
    run.add_argument("--transit", action="store_true", help="switches that are linked to this one reach each other through it")
    run.add_argument("--key", default="", metavar="FILE", help="our secret key, for tcp (default: softkvm host keys)")
    run.add_argument("--peers", default="", metavar="DIR", help="public keys of switches that may call (default: keys/peers)")
    run.add_argument("--ageing", type=float, default=300.0, metavar="SECONDS", help="until a silent address is forgotten (300)")
    run.add_argument("--mac-limit", type=int, default=4096, metavar="N", help="addresses that are remembered (4096)")
    run.add_argument("--capture", metavar="FILE", help="record everything (pcapng)")
    show = verbs.add_parser("show", help="ports, counters, addresses")
    show.add_argument("name", nargs="?")
    show.add_argument("--json", action="store_true")
    show.add_argument("--table", action="store_true", help="with the addresses")
    change = verbs.add_parser("set", help="change a port's settings")
    for argument in ("name", "port", "settings"):
        change.add_argument(argument)
    unplug = verbs.add_parser("unplug", help="hang up on who is plugged in")
    unplug.add_argument("name")
    unplug.add_argument("port")
    capture = verbs.add_parser("capture", help="record frames until Ctrl-C (pcapng)")
    capture.add_argument("name")
    capture.add_argument("file")
    capture.add_argument("--port", action="append", default=[], help="only this port, both directions")
    capture.add_argument("--stop", action="store_true", help="end a recording whose command was killed")
    stop = verbs.add_parser("stop", help="end a switch")
    stop.add_argument("name", nargs="+")
    options = parser.parse_args(arguments)
    what = {"run": _run, "show": _show, "set": _set, "unplug": _unplug, "capture": _capture, "stop": _stop}[options.verb]
    from qemu_user.switch.control import ControlError

    try:
        return what(options, arguments)
    except (ConfigError, ControlError) as error:
        sys.stderr.write(f"softkvm switch: {error}\n")
        return 1


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    from qemu_user.backends.errors import BackendError
    from qemu_user.migration import places
    from qemu_user.switch.capture import Capture
    from qemu_user.switch.plan import SwitchPlan, parse_link, parse_port
    from qemu_user.switch.process import Switch, SwitchError
    from qemu_user.switch.settings import settings_from

    if not places.is_name(options.name):
        raise ConfigError(f"{options.name!r}: a switch's name has 1 to 63 letters, digits, '.', '_' and '-'")
    if options.ageing <= 0 or not 1 <= options.mac_limit <= 1 << 20:
        raise ConfigError("--ageing has to be more than 0, --mac-limit 1 to 1048576")
    plan = SwitchPlan(
        name=options.name, ports=tuple(map(parse_port, options.port)), listen=options.listen,
        links=tuple(map(parse_link, options.link)), default=settings_from(options.default), transit=options.transit,
        ageing=options.ageing, limit=options.mac_limit, key=options.key, peers=options.peers,
    )  # fmt: skip
    names = [port.name for port in plan.ports]
    if len(names) != len(set(names)):
        raise ConfigError("--port: two ports of one name")
    if options.detach and _READY not in os.environ:
        return _detach(options.name, arguments)
    switch = None
    try:
        capture = Capture(options.capture) if options.capture else None
        switch = Switch(plan, _log)
        switch.start()
    except (SwitchError, BackendError) as error:
        if switch is not None:
            switch.close()
        sys.stderr.write(f"softkvm switch: {error}\n")
        return 1
    if capture is not None:
        switch.add_capture(capture)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: switch.stop())
    if ready := os.environ.pop(_READY, ""):
        os.write(int(ready), b"r")
        os.close(int(ready))
    else:
        listens = f", for other switches at {switch.listen}" if plan.listen else ""
        _log(f"runs; VMs join with --netdev switch,name={plan.name}, QEMU at {switch.directory}/qemu.sock{listens}")
    try:
        switch.run()
    finally:
        switch.close()
    return 0


def _log(sentence: str) -> None:
    sys.stderr.write(f"softkvm switch: {sentence}\n")
    sys.stderr.flush()


def _detach(name: str, arguments: list[str]) -> int:
    """The same in a process of its own; return when it serves."""
    from qemu_user.management.registry import made_runtime_directory

    log = made_runtime_directory() / f"switch-{name}.log"
    readable, writable = os.pipe()
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "qemu_user.cli.main", "switch", *arguments],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, pass_fds=[writable],
            env={**os.environ, _READY: str(writable)},
        )  # fmt: skip
    os.close(writable)
    with os.fdopen(readable, "rb") as ready:
        started = bool(ready.read(1))
    if started:
        sys.stdout.write(f"{name}\n")
        return 0
    status = child.wait()
    sys.stderr.write(log.read_text(errors="replace"))
    log.unlink(missing_ok=True)
    return status or 1


def _ask(name: str, execute: str, **arguments: Any) -> Any:
    from qemu_user.switch.control import ControlError, ask
    from qemu_user.switch.process import socket_of

    try:
        return ask(socket_of(name, "control.sock"), execute, **arguments)
    except OSError as error:
        why = error.strerror or error
        raise ControlError(f"no switch {name} is running ({why}); softkvm switch show lists them") from error


def _show(options: argparse.Namespace, arguments: list[str]) -> int:
    from qemu_user.management.registry import list_running
    from qemu_user.switch.control import ControlError
    from qemu_user.switch.process import KIND

    names = [options.name] if options.name else [directory.name for directory in list_running(KIND)]
    found = []
    for name in names:
        try:
            found.append(_ask(name, "show", table=options.table or options.json))
        except ControlError:
            if options.name:
                raise
    if options.json:
        sys.stdout.write(json.dumps(found[0] if options.name else found, indent=2) + "\n")
        return 0
    if not found:
        sys.stdout.write("no switch is running; softkvm switch run -d starts one\n")
    for switch in found:
        sys.stdout.write(_text(switch))
    return 0


def _text(switch: dict[str, Any]) -> str:
    """What people read."""
    lines = [
        f"switch {switch['name']}: pid {switch['pid']}, {switch['addresses']} of {switch['address_limit']} addresses, "
        f"{switch['moves']} moved" + (f", other switches at {switch['listen']}" if switch["listen"] else ""),
        f"  {'PORT':24} {'KIND':7} {'UP':4} {'SETTINGS':28} {'IN':>16} {'OUT':>16} {'DROPPED':>8}  PEER",
    ]
    for port in switch["ports"]:
        dropped = port["rx_broken"] + port["rx_refused"] + port["tx_dropped"]
        lines.append(
            f"  {port['name']:24} {port['kind']:7} {'yes' if port['up'] else 'no':4} {port['settings']:28} "
            f"{port['rx_frames']:>7} {_bytes(port['rx_bytes']):>8} {port['tx_frames']:>7} {_bytes(port['tx_bytes']):>8} "
            f"{dropped:>8}  {port['peer']}"
        )
    for capture in switch["captures"]:
        lines.append(f"  recorded to {capture['file']}: {capture['frames']} frames")
    for entry in switch.get("table", []):
        lines.append(f"  {entry['mac']}  VLAN {entry['vlan']:<4} {entry['port']}  {entry['age']:.0f} s ago")
    return "\n".join(lines) + "\n"


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    raise AssertionError


def _set(options: argparse.Namespace, arguments: list[str]) -> int:
    sys.stdout.write(_ask(options.name, "set", port=options.port, settings=options.settings) + "\n")
    return 0


def _unplug(options: argparse.Namespace, arguments: list[str]) -> int:
    _ask(options.name, "unplug", port=options.port)
    return 0


def _capture(options: argparse.Namespace, arguments: list[str]) -> int:
    path = os.path.abspath(options.file)
    if options.stop:
        return _captured(_ask(options.name, "capture-stop", file=path))
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    _ask(options.name, "capture", file=path, ports=options.port)
    _log(f"records {options.name} to {path}; Ctrl-C ends it")
    signal.sigwait(signals)
    return _captured(_ask(options.name, "capture-stop", file=path))


def _captured(done: dict[str, Any]) -> int:
    lost = f", {done['dropped']} lost" if done["dropped"] else ""
    _log(f"{done['frames']} frames{lost}")
    return 0


def _stop(options: argparse.Namespace, arguments: list[str]) -> int:
    for name in options.name:
        _ask(name, "stop")
    return 0
