"""What a port of the switch is to be: VLANs, isolation, rates. Made from text that the user, or a VM's netdev, gives.

    vlan=10                 access port: untagged frames belong to VLAN 10, tagged ones are refused
    trunk=10:20-30,native=1 trunk: tagged frames of these VLANs (`all`: every one); untagged are of `native` (none: refused)
    isolated=on             hears and reaches only ports that are not isolated
    rate-in=, rate-out=     from and to whom is plugged in; tc's units: 10mbit, 1gbit (bits), 500kbps, 20mbps (bytes)
    burst=                  bytes that may go at once at full speed; 256k
"""

from __future__ import annotations

import re

import msgspec

from qemu_user.config.errors import ConfigError
from qemu_user.config.keyvals import KeyValues, parse_size

VLAN_IDS = range(1, 4095)
"""802.1Q, table 9-2: 0 means no VLAN, 4095 is reserved."""
_RATE = re.compile(r"(\d+(?:\.\d+)?)([kmgt]?)(bit|bps)?\Z", re.IGNORECASE)
_POWERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
DEFAULT_BURST = 256 << 10
LEAST_BURST = 64 << 10
"""A frame with all its segments goes as one."""
KEYS = ("vlan", "trunk", "native", "isolated", "rate-in", "rate-out", "burst")


class PortSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How frames of a port are classified and limited. Rates are bytes per second, 0: no limit."""

    vlan: int = 1
    """Access VLAN; of a trunk, the native VLAN, 0 for none."""
    trunk: tuple[tuple[int, int], ...] | None = None
    """None: an access port; else the VLANs that go tagged, as ranges with both ends."""
    isolated: bool = False
    rate_in: int = 0
    rate_out: int = 0
    burst: int = DEFAULT_BURST

    def carries(self, vlan: int) -> bool:
        """Whether frames of a VLAN leave here."""
        return vlan == self.vlan or self.tags(vlan)

    def tags(self, vlan: int) -> bool:
        """Whether frames of a VLAN carry a tag here."""
        return vlan != self.vlan and any(low <= vlan <= high for low, high in self.trunk or ())

    def describe(self) -> str:
        """As the user would write it."""
        words = [f"vlan={self.vlan}"]
        if self.trunk is not None:
            ids = ":".join(f"{low}-{high}" if low != high else f"{low}" for low, high in self.trunk)
            words = [f"trunk={'all' if self.trunk == _ALL else ids}", f"native={self.vlan or 'none'}"]
        words += ["isolated"] if self.isolated else []
        words += [f"{key}={rate}bps" for key, rate in (("rate-in", self.rate_in), ("rate-out", self.rate_out)) if rate]
        return ",".join(words)


_ALL = ((VLAN_IDS[0], VLAN_IDS[-1]),)


def _vlan(text: str, where: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) not in VLAN_IDS:
        raise ConfigError(f"{where}: {text!r} is no VLAN: {VLAN_IDS[0]} to {VLAN_IDS[-1]}")
    return int(text)


def _ranges(text: str, where: str) -> tuple[tuple[int, int], ...]:
    if text in ("all", "on"):
        return _ALL
    found = []
    for part in text.split(":"):
        low, dash, high = part.partition("-")
        first = _vlan(low, where)
        last = _vlan(high, where) if dash else first
        if last < first:
            raise ConfigError(f"{where}: {part} is no range of VLANs")
        found.append((first, last))
    return tuple(found)


def parse_rate(text: str, where: str) -> int:
    """Bytes per second of tc's `10mbit`, `1gbit`, `500kbps` (bytes); a bare number is bits. ConfigError."""
    match = _RATE.match(text)
    if match is None:
        raise ConfigError(f"{where}: {text!r} is no rate such as 100mbit, 1gbit (bits) or 20mbps (bytes per second)")
    number = float(match[1]) * _POWERS[match[2].lower()] / (1 if (match[3] or "bit").lower() == "bps" else 8)
    if 0 < number < 1000:
        raise ConfigError(f"{where}: {text}: at least 8kbit")
    return int(number)


def take_settings(values: KeyValues, base: PortSettings | None = None) -> PortSettings:
    """The settings among an option's keys, which are consumed; what is not said is as in `base`. ConfigError."""
    base = base if base is not None else PortSettings()
    where = f"{values.option} {values.text}"
    vlan, trunk, native = values.take("vlan"), values.take("trunk"), values.take("native")
    if vlan and (trunk or native):
        raise ConfigError(f"{where}: vlan= is for access ports, trunk= with native= for trunks")
    changes: dict[str, object] = {}
    if vlan:
        changes.update(vlan=_vlan(vlan, where), trunk=None)
    if trunk:
        changes.update(trunk=_ranges(trunk, where), vlan=0)
    if native:
        if not trunk and base.trunk is None:
            raise ConfigError(f"{where}: native= goes with trunk=")
        changes["vlan"] = 0 if native == "none" else _vlan(native, where)
    if "isolated" in values.values:
        changes["isolated"] = values.take_switch("isolated", False)
    for key in ("rate-in", "rate-out"):
        if text := values.take(key):
            changes[key.replace("-", "_")] = 0 if text == "none" else parse_rate(text, where)
    if burst := values.take("burst"):
        changes["burst"] = max(parse_size(values.option, burst, "B"), LEAST_BURST)
    return msgspec.structs.replace(base, **changes)


def settings_from(text: str, base: PortSettings | None = None) -> PortSettings:
    """take_settings() of a whole text, where nothing else may stand. ConfigError."""
    if not text:
        return base if base is not None else PortSettings()
    values = KeyValues("port", text)
    found = take_settings(values, base)
    values.done()
    return found
