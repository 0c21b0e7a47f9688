"""QEMU's option values: `stdio,id=c,mux=on` into a mapping, sizes, switches.

Called by qemu_options.py only. A comma in a value is written twice. Errors name the option, the key and what
is allowed.
"""

from __future__ import annotations

import re

from qemu_user.config.errors import ConfigError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)([BKMGT]?)(?:I?B)?\Z", re.IGNORECASE)
_UNITS = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_OLD_SWITCHES = {"nowait": ("wait", "off"), "nodelay": ("delay", "off")}


def split_commas(text: str) -> list[str]:
    """Parts between single commas, with doubled ones made single."""
    parts, current, i = [], "", 0
    while i < len(text):
        if text[i] == ",":
            if text[i + 1 : i + 2] == ",":
                current += ","
                i += 2
                continue
            parts.append(current)
            current = ""
        else:
            current += text[i]
        i += 1
    return [*parts, current]


class KeyValues:
    """One option's value. take*() consume keys; done() complains of what nobody took."""

    def __init__(self, option: str, text: str, implied: str = "") -> None:
        """`implied`: the key of a first part without one."""
        self.option, self.text = option, text
        self.values: dict[str, list[str]] = {}
        for index, part in enumerate(split_commas(text)):
            key, equals, value = part.partition("=")
            if not equals:
                if index == 0 and implied:
                    key, value = implied, part
                else:
                    key, value = _OLD_SWITCHES.get(part, (part, "on"))
            if not key:
                raise ConfigError(f"{option} {text}: an empty part (a comma in a value is written twice)")
            self.values.setdefault(key, []).append(value)

    def take_all(self, key: str) -> list[str]:
        """Every value of a key."""
        return self.values.pop(key, [])

    def take(self, key: str, default: str = "") -> str:
        """The last value of a key."""
        found = self.take_all(key)
        return found[-1] if found else default

    def take_switch(self, key: str, default: bool) -> bool:
        """on/off, yes/no, true/false."""
        value = self.take(key, "on" if default else "off").lower()
        if value not in ("on", "off", "yes", "no", "true", "false"):
            raise ConfigError(f"{self.option} {self.text}: {key}={value}: on or off")
        return value in ("on", "yes", "true")

    def take_number(self, key: str, default: int | None = None) -> int | None:
        """A number, decimal or 0x."""
        value = self.take(key)
        if not value:
            return default
        try:
            return int(value, 0)
        except ValueError:
            raise ConfigError(f"{self.option} {self.text}: {key}={value}: expected a number") from None

    def take_choice(self, key: str, choices: tuple[str, ...], default: str = "") -> str:
        """One of some words."""
        value = self.take(key, default)
        if value not in choices:
            raise ConfigError(f"{self.option} {self.text}: {key}={value}: one of {', '.join(choices)}")
        return value

    def ignore(self, *keys: str) -> None:
        """Keys that QEMU knows and that make no difference here."""
        for key in keys:
            self.take_all(key)

    def done(self) -> None:
        """ConfigError if a key is left."""
        if self.values:
            raise ConfigError(f"{self.option} {self.text}: {next(iter(self.values))}: no such setting here")


def parse_size(option: str, text: str, unit: str = "M") -> int:
    """Bytes of '512M', '1.5G', or of a bare number in `unit`."""
    match = _SIZE.match(text)
    if match is None:
        raise ConfigError(f"{option} {text}: expected a size such as 512M or 2G")
    return int(float(match[1]) * _UNITS[(match[2] or unit).upper()])
