"""The contract of a management command: name, argument and result Structs, when it is allowed, what it does.

One file per command in this folder; __init__.py lists them. QMP serves them all; the command line uses the
same names. A worked example is query_status.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from qemu_user.machine.machine import Machine


class Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of argument Structs; as it is, a command without arguments."""


class Result(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Base of result Structs; as it is, the empty result. Field names become QMP's with dashes."""


class CommandError(Exception):
    """Refused: `kind` is QMP's error class, the text what is wrong and what to do."""

    def __init__(self, text: str, kind: str = "GenericError") -> None:
        super().__init__(text)
        self.kind = kind


class Command(NamedTuple):
    """`states`: run states in which it is allowed, empty for all."""

    name: str
    run: Callable[[Machine, Any], Any]
    doc: str
    arguments: type[Arguments] = Arguments
    states: tuple[str, ...] = ()
