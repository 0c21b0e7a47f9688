"""`-blockdev`: disks as QEMU's graph of nodes, a format over a file or an NBD server, in dotted keys or as JSON.

A node is named by `node-name` and used by a `-device` (drive=NODE) or by another node (file=NODE); a device's becomes a Drive.
Called by qemu_options.py. Drivers: raw, qcow2 over file, host_device, nbd; throttle above them. Limits and certificates are
`-object`s that nodes name.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from qemu_user.config.errors import ConfigError
from qemu_user.config.keyvals import KeyValues, parse_size, split_commas
from qemu_user.config.machine_config import DISK_LIMITS, Drive

Node = dict[str, Any]
FORMATS, FILTERS, PROTOCOLS = ("raw", "qcow2"), ("throttle",), ("file", "host_device", "nbd")
OBJECTS = ("throttle-group", "tls-creds-x509")
_DEEPEST = 4
"""Nodes over each other."""
_EVERYWHERE = ("driver", "node-name", "read-only", "auto-read-only", "discard", "cache", "detect-zeroes", "force-share")
_KEYS = {
    "raw": ("file",),
    "qcow2": ("file", "lazy-refcounts", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other", "overlap-check",
              "l2-cache-size", "l2-cache-entry-size", "refcount-cache-size", "cache-size", "cache-clean-interval"),
    "file": ("filename", "aio", "locking", "drop-cache", "x-check-cache-dropped", "aio-max-batch"),
    "host_device": ("filename", "aio", "locking", "drop-cache", "x-check-cache-dropped", "aio-max-batch"),
    "nbd": ("server", "export", "reconnect-delay", "open-timeout", "tls-creds", "tls-hostname"),
    "throttle": ("file", "throttle-group"),
}  # fmt: skip
"""What a driver may be told; what changes nothing here is taken and forgotten."""


class BlockNodes:
    """The nodes of a command line."""

    def __init__(self) -> None:
        self._nodes: dict[str, tuple[Node, str]] = {}
        self._used: set[str] = set()
        self._groups: dict[str, dict[str, int]] = {}
        self._certificates: dict[str, str] = {}

    def add_object(self, kind: str, values: KeyValues) -> None:
        """One -object of OBJECTS. ConfigError."""
        name = values.take("id")
        if not name or name in self._groups or name in self._certificates:
            raise ConfigError(f"-object {values.text}: needs an id= that no other object has")
        if kind == "throttle-group":
            limits = {limit: values.take(f"x-{limit}") or values.take(f"limits.{limit}") for limit in DISK_LIMITS}
            self._groups[name] = {limit: parse_size(limit, text, "B") for limit, text in limits.items() if text}
        else:
            values.take_choice("endpoint", ("client",), "client")
            values.take_choice("verify-peer", ("on", "yes", "true"), "on")
            values.ignore("priority")
            self._certificates[name] = values.take("dir")
        values.done()

    def add(self, text: str) -> None:
        """One -blockdev. ConfigError."""
        node = _read(text)
        name = node.get("node-name")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"-blockdev {text}: needs node-name=NAME")
        if name in self._nodes:
            raise ConfigError(f"-blockdev {text}: there is a node {name} already")
        _check(node, text)
        self._nodes[name] = node, text

    def __contains__(self, name: str) -> bool:
        return name in self._nodes and name not in self._used

    def unused(self) -> list[str]:
        """Nodes that neither a device nor another node uses."""
        return [name for name in self._nodes if name not in self._used]

    def drive(self, name: str) -> Drive:
        """The disk that node `name` is, for a device. ConfigError."""
        top, text = self._nodes[name]
        chain = [top]
        self._used.add(name)
        while (child := chain[-1].get("file")) is not None:
            if len(chain) >= _DEEPEST:
                raise ConfigError(f"-blockdev {text}: more nodes over each other than are supported")
            chain.append(self._child(child, text))
        bottom = chain[-1]
        if bottom["driver"] not in PROTOCOLS:
            raise ConfigError(f"-blockdev {text}: {bottom['driver']} needs file=NODE or file.driver=")
        formats = [node["driver"] for node in chain if node["driver"] in FORMATS]
        if formats.count("qcow2") and formats.index("qcow2") != len(formats) - 1:
            raise ConfigError(f"-blockdev {text}: qcow2 has to lie directly over the file")
        drivers = [node["driver"] for node in chain]
        if "throttle" in drivers and (drivers.count("throttle") > 1 or "qcow2" in drivers[: drivers.index("throttle")]):
            raise ConfigError(f"-blockdev {text}: one throttle node, above the format: it limits what the guest asks for")
        settings: dict[str, Any] = {}
        if "throttle" in drivers:
            settings["limits"] = self._limits(chain[drivers.index("throttle")], text)
        file: Any = None
        if bottom["driver"] == "nbd":
            file, settings["reconnect"] = self._nbd(bottom, text), _number(bottom, "reconnect-delay", 10, text)
        else:
            file = bottom.get("filename")
            if not isinstance(file, str) or not file:
                raise ConfigError(f"-blockdev {text}: {bottom['driver']} needs filename=FILE")
        return Drive(
            id=name,
            file=file,
            format="qcow2" if "qcow2" in formats else "raw",
            readonly=any(_switch(node, "read-only", text) for node in chain),
            discard=_choice(top, "discard", ("ignore", "off", "unmap", "on"), text) in ("unmap", "on"),
            detect_zeroes=_choice(top, "detect-zeroes", ("off", "on", "unmap"), text),
            cache=_cache(chain, text),
            **settings,
        )

    def _limits(self, node: Node, text: str) -> dict[str, int]:
        name = node.get("throttle-group")
        if not isinstance(name, str) or name not in self._groups:
            raise ConfigError(f"-blockdev {text}: throttle-group={name}: no free -object throttle-group of that id before it")
        return self._groups.pop(name)

    def _nbd(self, node: Node, text: str) -> str:
        address, name = _nbd(node, text), node.get("tls-creds")
        if name is None:
            return address
        if not isinstance(name, str) or name not in self._certificates:
            raise ConfigError(f"-blockdev {text}: tls-creds={name}: no -object tls-creds-x509 of that id before the device")
        settings = {"tls-certificates": self._certificates[name], "tls-hostname": str(node.get("tls-hostname", ""))}
        more = "&".join(f"{key}={quote(value, safe='/')}" for key, value in settings.items() if value)
        secure = address.replace("nbd", "nbds", 1)
        return f"{secure}{'&' if '?' in secure else '?'}{more}" if more else secure

    def _child(self, child: Any, text: str) -> Node:
        if isinstance(child, dict):
            _check(child, text)
            return child
        if not isinstance(child, str) or child not in self:
            raise ConfigError(f"-blockdev {text}: file={child}: no free -blockdev of that node-name before it")
        self._used.add(child)
        return self._nodes[child][0]


def _read(text: str) -> Node:
    """Nested, whichever way it was written. ConfigError."""
    if text.startswith("{"):
        try:
            node = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"-blockdev {text}: not JSON: {error}") from error
        return dict(node)
    tree: Node = {}
    for index, part in enumerate(split_commas(text)):
        key, equals, value = part.partition("=")
        if not equals:
            key, value = ("driver", part) if index == 0 else (part, "on")
        *path, last = key.split(".")
        place = tree
        for name in path:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ConfigError(f"-blockdev {text}: {key}: {name} has a value of its own")
        if not last or last in place:
            raise ConfigError(f"-blockdev {text}: {key}: said twice, or nothing")
        place[last] = value
    return tree


def _check(node: Node, text: str) -> None:
    driver = node.get("driver")
    if driver not in _KEYS:
        raise ConfigError(f"-blockdev {text}: driver={driver}: one of {', '.join(_KEYS)}")
    for key in node:
        if key not in (*_EVERYWHERE, *_KEYS[driver]):
            raise ConfigError(f"-blockdev {text}: {key}: no such setting of {driver} here")


def _switch(node: Node, key: str, text: str) -> bool:
    value = node.get(key, False)
    if value in ("on", "off"):
        return bool(value == "on")
    if not isinstance(value, bool):
        raise ConfigError(f"-blockdev {text}: {key}={value}: on or off")
    return value


def _choice(node: Node, key: str, choices: tuple[str, ...], text: str) -> str:
    """The first is the default."""
    value = node.get(key, choices[0])
    if value not in choices:
        raise ConfigError(f"-blockdev {text}: {key}={value}: one of {', '.join(choices)}")
    return str(value)


def _number(node: Node, key: str, default: int, text: str) -> int:
    value = node.get(key, default)
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ConfigError(f"-blockdev {text}: {key}={value}: expected a number") from None


def _cache(chain: list[Node], text: str) -> str:
    """Of opening.CACHES: what any node of the chain says."""
    direct = no_flush = False
    for node in chain:
        cache = node.get("cache", {})
        if not isinstance(cache, dict) or set(cache) - {"direct", "no-flush"}:
            raise ConfigError(f"-blockdev {text}: cache.direct=on|off and cache.no-flush=on|off")
        direct |= _switch(cache, "direct", text)
        no_flush |= _switch(cache, "no-flush", text)
    return "unsafe" if no_flush else "none" if direct else "writeback"


def _nbd(node: Node, text: str) -> str:
    server, export = node.get("server"), quote(str(node.get("export", "")))
    kind = server.get("type") if isinstance(server, dict) else None
    if isinstance(server, dict) and kind == "unix" and server.get("path"):
        return f"nbd+unix:///{export}?socket={quote(str(server['path']), safe='/')}"
    if isinstance(server, dict) and kind == "inet" and server.get("host") and server.get("port"):
        host = str(server["host"])
        return f"nbd://{f'[{host}]' if ':' in host else host}:{server['port']}/{export}"
    wanted = "server.type=inet,server.host=,server.port= or server.type=unix,server.path="
    raise ConfigError(f"-blockdev {text}: nbd needs {wanted}")
