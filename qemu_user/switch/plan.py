"""What a switch is to be, from the command line: ports that are there from the start, links to others, limits."""

from __future__ import annotations

import os
import re

import msgspec

from qemu_user.config.errors import ConfigError
from qemu_user.config.keyvals import KeyValues
from qemu_user.switch.mac_table import AGEING_SECONDS, LIMIT
from qemu_user.switch.settings import PortSettings, take_settings

_PORT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.#/-]{0,126}\Z")
_MAX_PATH = 107


def is_port_name(text: str) -> bool:
    """Whether a port may be called so."""
    return _PORT_NAME.match(text) is not None


class PortPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A port by name. At most one of the ways says what is plugged in; without any, a VM's netdev takes the place by its
    name, VM/NETDEV or VM."""

    name: str
    settings: PortSettings
    tap: str = ""
    listen: str = ""
    """A Unix socket for one QEMU (`-netdev stream`) at a time."""
    connect: str = ""
    """The Unix socket of a QEMU (`server=on`)."""
    local: str = ""
    remote: str = ""
    """A QEMU's `-netdev dgram`: its remote.path is our `local`."""


class LinkPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Another switch that we call: tcp://HOST:PORT or ipc://PATH."""

    uri: str
    peer_key: str = ""
    settings: PortSettings


class SwitchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The whole switch. `default`: settings of ports that say nothing."""

    name: str = "default"
    ports: tuple[PortPlan, ...] = ()
    listen: str = ""
    """Where other switches may call."""
    links: tuple[LinkPlan, ...] = ()
    link_settings: PortSettings = PortSettings(vlan=0, trunk=((1, 4094),))
    default: PortSettings = PortSettings()
    transit: bool = False
    ageing: float = AGEING_SECONDS
    limit: int = LIMIT
    key: str = ""
    peers: str = ""


def parse_port(text: str) -> PortPlan:
    """`NAME[,tap=IF|listen=PATH|connect=PATH|local=PATH,remote=PATH][,SETTINGS]`. ConfigError."""
    values = KeyValues("--port", text, "name")
    name = values.take("name")
    if not is_port_name(name):
        raise ConfigError(f"--port {text}: a port's name has 1 to 127 letters, digits, '.', '_', '/' and '-'")
    ways = {key: values.take(key) for key in ("tap", "listen", "connect", "local", "remote")}
    plan = PortPlan(name=name, settings=take_settings(values), **ways)
    values.done()
    given = sum(map(bool, (plan.tap, plan.listen, plan.connect, plan.local or plan.remote)))
    if given > 1 or bool(plan.local) != bool(plan.remote):
        raise ConfigError(f"--port {text}: one of tap=, listen=, connect=, or local= with remote=")
    for path in (plan.listen, plan.connect, plan.local, plan.remote):
        if len(os.fsencode(path)) > _MAX_PATH:
            raise ConfigError(f"--port {text}: {path}: a socket's path has at most {_MAX_PATH} bytes")
    return plan


def parse_link(text: str) -> LinkPlan:
    """`tcp://HOST:PORT[,peer-key=FILE][,SETTINGS]` or `ipc://PATH`. ConfigError."""
    values = KeyValues("--link", text, "uri")
    uri = values.take("uri")
    if not uri.startswith(("tcp://", "ipc://")):
        raise ConfigError(f"--link {text}: expected tcp://HOST:PORT or ipc://PATH")
    base = SwitchPlan().link_settings
    plan = LinkPlan(uri=uri, peer_key=values.take("peer-key"), settings=take_settings(values, base))
    values.done()
    return plan
