"""QEMU's network options: what stands behind `-netdev` and `-nic`, into a Net. Called by qemu_options.py only.

Keys that QEMU knows and this machine has not are refused by name; those that make no difference are accepted.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any

from qemu_user.config.errors import ConfigError
from qemu_user.config.keyvals import KeyValues
from qemu_user.config.machine_config import Net
from qemu_user.switch.settings import KEYS, take_settings

KINDS = "user, passt, tap, stream, socket, dgram, switch"


def parse_net(values: KeyValues, name: str) -> Net:
    """The back end called `name`; all keys but id are consumed. ConfigError."""
    kind = values.take_choice("type", tuple(_KINDS))
    fields: dict[str, Any] = {"queues": values.take_number("queues", 1)}
    _KINDS[kind](values, fields)
    values.done()
    return Net(id=name, **fields)


def published(text: str) -> str:
    """docker's -p as QEMU's hostfwd rule: [[HOST:]PORT:]GUESTPORT[/tcp|/udp]. ConfigError."""
    rule, slash, protocol = text.partition("/")
    protocol = protocol if slash else "tcp"
    host = ""
    if rule.startswith("["):
        host, bracket, rule = rule.partition("]:")
        host += "]" if bracket else ""
    parts = rule.split(":")
    if not host and len(parts) == 3:
        host = parts.pop(0)
    guest = parts[-1]
    port = parts[0] if len(parts) == 2 else guest
    numbers = [part for part in (port, guest) if part.isascii() and part.isdigit() and 0 < int(part) < 65536]
    if len(parts) > 2 or len(numbers) != 2 or protocol not in ("tcp", "udp"):
        raise ConfigError(f"-p {text}: expected [[HOST:]PORT:]GUESTPORT[/tcp|/udp], such as 2222:22")
    return f"{protocol}:{host}:{port}-:{guest}"


def _fail(values: KeyValues, sentence: str) -> ConfigError:
    return ConfigError(f"{values.option} {values.text}: {sentence}")


def _address(values: KeyValues, key: str) -> str:
    text = values.take(key)
    try:
        return str(ipaddress.ip_address(text)) if text else ""
    except ValueError:
        raise _fail(values, f"{key}={text}: is no IP address") from None


def _user(values: KeyValues, fields: dict[str, Any]) -> None:
    fields["forwards"] = tuple(values.take_all("hostfwd"))
    fields["dns"] = _address(values, "dns")
    fields["search"] = tuple(values.take_all("dnssearch"))
    fields["restrict"] = values.take_switch("restrict", False)
    fields["ipv4"], fields["ipv6"] = values.take_switch("ipv4", True), values.take_switch("ipv6", True)
    if not fields["ipv4"] and not fields["ipv6"]:
        raise _fail(values, "ipv4=off and ipv6=off leave no network")
    net, host, first = values.take("net"), _address(values, "host"), _address(values, "dhcpstart")
    if net or host or first:
        fields["network"], fields["gateway"], fields["address"] = _network(values, net or "10.0.2.0/24", host, first)
    for key in ("guestfwd", "smb", "tftp", "bootfile", "smbserver"):
        if values.take_all(key):
            raise _fail(values, f"{key}=: passt has nothing like it")
    values.ignore("hostname", "domainname", "tftp-server-name", "ipv6-dns", "ipv6-host", "ipv6-prefix", "ipv6-prefixlen")


def _network(values: KeyValues, net: str, host: str, first: str) -> tuple[str, str, str]:
    """(network, the host's address in it, the guest's): QEMU's are the 2nd and the 15th."""
    if "/" not in net:
        net += "/24"
    try:
        network = ipaddress.IPv4Network(net, strict=False)
    except ValueError:
        raise _fail(values, f"net={net}: expected an IPv4 network such as 10.0.2.0/24") from None
    if (network.prefixlen > 27 and not (host and first)) or network.prefixlen < 4:
        raise _fail(values, f"net={net}: too small or too large a network")
    gateway = ipaddress.ip_address(host) if host else network[2]
    address = ipaddress.ip_address(first) if first else network[15]
    for what, value in (("host", gateway), ("dhcpstart", address)):
        if value not in network:
            raise _fail(values, f"{what}={value}: is not in net={network}")
    if gateway == address:
        raise _fail(values, f"host and guest cannot both be {address}")
    return str(network), str(gateway), str(address)


def _tap(values: KeyValues, fields: dict[str, Any]) -> None:
    fields.update(kind="tap", ifname=values.take("ifname", "tap0"))
    for key in ("script", "downscript"):
        script = values.take(key, "no")
        if script not in ("no", ""):
            raise _fail(values, f"{key}={script}: no scripts are run here; set the interface up before, and say {key}=no")
    for key in ("fd", "fds", "br", "helper", "vhostfd", "vhostfds"):
        if values.take_all(key):
            raise _fail(values, f"{key}=: give the interface's name with ifname=")
    fields["vhost"] = values.take_switch("vhost", False) or values.take_switch("vhostforce", False)
    values.ignore("vnet_hdr", "sndbuf", "poll-us")


def _endpoint(values: KeyValues, prefix: str) -> tuple[str, str]:
    """(Unix path, host:port) of QEMU's socket address behind a prefix; one is empty."""
    kind = values.take(f"{prefix}.type", "unix")
    if kind == "unix":
        return values.take(f"{prefix}.path"), ""
    if kind != "inet":
        raise _fail(values, f"{prefix}.type={kind}: unix or inet")
    values.ignore(f"{prefix}.ipv4", f"{prefix}.ipv6", f"{prefix}.numeric", f"{prefix}.keep-alive")
    host, port = values.take(f"{prefix}.host"), values.take(f"{prefix}.port")
    return "", _host_port(values, f"{host}:{port}")


def _host_port(values: KeyValues, text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise _fail(values, f"{text}: expected HOST:PORT, the port 1 to 65535")
    return f"{host}:{port}"


def _stream(values: KeyValues, fields: dict[str, Any]) -> None:
    path, inet = _endpoint(values, "addr")
    if not path and not inet:
        raise _fail(values, "stream needs addr.type=unix,addr.path=SOCKET or addr.type=inet,addr.host=,addr.port=")
    fields.update(
        kind="stream", path=path, inet=inet, server=values.take_switch("server", False),
        reconnect=values.take_number("reconnect", 0), virtio_header=values.take_switch("vnet_hdr", False),
    )  # fmt: skip


def _socket(values: KeyValues, fields: dict[str, Any]) -> None:
    ways = {key: values.take(key) for key in ("listen", "connect", "udp", "mcast")}
    local = values.take("localaddr")
    given = [key for key, value in ways.items() if value]
    if values.take_all("fd") or len(given) != 1:
        raise _fail(values, "one of listen=[HOST]:PORT, connect=HOST:PORT, udp=HOST:PORT with localaddr=, mcast=ADDRESS:PORT")
    (way,) = given
    remote = _host_port(values, ways[way])
    if way in ("listen", "connect"):
        fields.update(kind="stream", inet=remote, server=way == "listen")
        return
    if way == "udp" and not local:
        raise _fail(values, "udp= needs localaddr=HOST:PORT")
    if way == "mcast":
        fields.update(kind="dgram", remote=remote, inet=local or "multicast")
    else:
        fields.update(kind="dgram", remote=remote, inet=_host_port(values, local))


def _dgram(values: KeyValues, fields: dict[str, Any]) -> None:
    path, inet = _endpoint(values, "local")
    remote_path, remote_inet = _endpoint(values, "remote")
    if not (path and remote_path) and not (inet and remote_inet):
        raise _fail(values, "dgram needs local.type= and remote.type=, both unix with .path or both inet with .host and .port")
    fields.update(kind="dgram", path=path, inet=inet, remote=remote_path or remote_inet)


def _switch(values: KeyValues, fields: dict[str, Any]) -> None:
    fields.update(kind="switch", switch=values.take("name", "default"), path=values.take("path"))
    words = {key: values.values[key][-1] for key in KEYS if key in values.values}
    take_settings(values)  # it complains of what cannot be
    fields["settings"] = ",".join(f"{key}={value}" for key, value in words.items())


_KINDS: dict[str, Callable[[KeyValues, dict[str, Any]], None]] = {
    "user": _user, "passt": _user, "tap": _tap, "stream": _stream, "socket": _socket, "dgram": _dgram, "switch": _switch,
}  # fmt: skip
