"""Which packages a system is made of: the wanted ones and, by Depends and Pre-Depends, what they need (Debian policy, 7.1,
7.2, 7.5).

Plain and predictable, no solver: of alternatives the first that is there already, else the first that the suite has. An
image has no conflicts to resolve; dpkg checks the result when it configures it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qemu_user.images.errors import ImageError

Package = dict[str, str]
"""A paragraph of the index."""

#: A relation: name, and what restricts it (version, architecture), which within one suite is fulfilled.
_NAME = re.compile(r"\s*([a-z0-9][a-z0-9+.-]*)")


def alternatives(field: str) -> list[list[str]]:
    """A Depends field as [[first or second], and third]."""
    groups = [[match[1] for part in group.split("|") if (match := _NAME.match(part))] for group in field.split(",")]
    return [group for group in groups if group]


def closure(listed: Iterable[Package], wanted: Sequence[str], priorities: Iterable[str] = ("required",)) -> list[Package]:
    """The packages of these priorities, the essential ones, `wanted`, and what they need, by name. ImageError: not there."""
    by_name: dict[str, Package] = {}
    providers: dict[str, list[str]] = {}
    for package in listed:
        by_name[package["Package"]] = package  # a later paragraph is a later version
        for group in alternatives(package.get("Provides", "")):
            providers.setdefault(group[0], []).append(package["Package"])
    levels = set(priorities)
    first = [name for name, package in by_name.items()
             if package.get("Priority") in levels or package.get("Essential") == "yes"]  # fmt: skip
    chosen: dict[str, Package] = {}
    waiting = [[name] for name in (*wanted, *sorted(first))]
    later: list[list[str]] = []
    while waiting or later:
        # Choices come last: what is chosen for other reasons may answer them.
        group = waiting.pop(0) if waiting else later.pop(0)
        found = [name for name in group if name in by_name] or [p for name in group for p in sorted(providers.get(name, ()))]
        if not found:
            raise ImageError(f"the archive has no package {' or '.join(group)}")
        if any(name in chosen or any(p in chosen for p in providers.get(name, ())) for name in (*group, *found)):
            continue
        if len(found) > 1 and waiting:
            later.append(group)
            continue
        package = chosen[found[0]] = by_name[found[0]]
        for field in ("Pre-Depends", "Depends"):
            for needed in alternatives(package.get(field, "")):
                (waiting if len(needed) == 1 else later).append(needed)
    return [chosen[name] for name in sorted(chosen)]
