"""Any process may be killed or stopped at any moment: nothing is left behind, and a bystander never notices."""

from __future__ import annotations

import pytest

from tests.framework.kill_storm import Storm


def test_a_short_storm() -> None:
    with Storm(1) as storm:
        storm.run(30)
        assert storm.done["client killed"] > 0
        assert storm.done["kvmcore-vm fuz killed"] > 0
        assert storm.done["looks at the bystander"] > 5


@pytest.mark.slow
def test_a_thousand() -> None:
    with Storm(2) as storm:
        storm.run(1000)
