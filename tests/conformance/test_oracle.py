"""Replays the recorded behaviour of real RISC-V KVM against a kvmcore: real client, real guest code.

Each check agrees, or stands in docs/deviations.md. That page is parsed here: a difference it does not list
fails, and so does one that it lists and that is no longer there.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conformance.oracle.backend import ClientBackend
from tests.conformance.oracle.port import Port
from tests.conformance.oracle.record import recorded
from tests.conformance.oracle.replay import replay

DEVIATIONS = Path(__file__).resolve().parents[2] / "docs" / "deviations.md"
KERNELS = {"7.2": "7.2.13", "6.12": "6.12.107"}
MOST_DEVIATIONS = 15


def deviations(compat: str) -> set[str]:
    """Names of the checks that docs/deviations.md lists for one compat."""
    names: set[str] = set()
    for line in DEVIATIONS.read_text(encoding="utf-8").splitlines():
        match = re.match(r"- (?:(7\.2|6\.12): )?`(.*)`$", line)
        if match and match[1] in (None, compat):
            names.add(match[2])
    return names


def test_the_list_is_short() -> None:
    headings = re.findall(r"^## \d+\.", DEVIATIONS.read_text(encoding="utf-8"), re.MULTILINE)
    assert 0 < len(headings) <= MOST_DEVIATIONS
    for compat, kernel in KERNELS.items():
        listed = deviations(compat)
        assert listed <= recorded(kernel).keys()
        assert len(listed) <= MOST_DEVIATIONS + 5 * (compat == "6.12")


@pytest.mark.parametrize("compat", KERNELS)
def test_replay(compat: str, tmp_path: Path) -> None:
    with ClientBackend(compat, tmp_path) as backend:
        observed = dict(replay(Port(backend, compat)))
    expected = recorded(KERNELS[compat])
    differing = {name for name, result in expected.items() if observed.get(name) != result}
    listed = deviations(compat)
    unlisted = [
        f"{name}: {expected[name]!r}, here {observed.get(name)!r}" for name in sorted(differing - listed)
    ]
    assert not unlisted, "\n".join(unlisted)
    assert not listed - differing, "no longer different: " + ", ".join(sorted(listed - differing))
    unknown = observed.keys() - expected.keys()
    assert len(unknown) <= len(differing), sorted(unknown)
