"""pytest ends when its tests have, with a status that says what came of them, whatever they have left behind.

Also where several processes share the tests (pytest-xdist): each looks after what it has started, the first one tells.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.framework.leftovers import Leftovers

_GRACE_SECONDS = 120.0
"""After a test's own time limit, which interrupts Python, for tests that it does not interrupt."""
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
_left = Leftovers()
_told: list[str] = []
_output = -1


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """pytest's own has too long a name for sockets in it, where several processes share the tests."""
    with tempfile.TemporaryDirectory(prefix="t-", ignore_cleanup_errors=True) as folder:
        yield Path(folder).resolve()


def pytest_configure(config: pytest.Config) -> None:
    global _output
    capture = config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        _output = os.dup(2)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End the run, with everybody's stacks, when a test goes on far beyond its time limit."""
    marker = item.get_closest_marker("timeout")
    limit = float(marker.args[0] if marker and marker.args else item.config.getini("timeout"))
    faulthandler.dump_traceback_later(limit + _GRACE_SECONDS, exit=True, file=_output)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    _told.extend(getattr(node, "workeroutput", {}).get("left behind", []))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    _told.extend(_left.clear())
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left behind"] = _told
    if _told and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _told:
        terminalreporter.section("left behind by tests", red=True)
        for line in _told:
            terminalreporter.line(line)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Python waits for its threads: not for one that a failed test has left."""
    if _left.threads() and not hasattr(config, "workeroutput"):
        session = config.pluginmanager.getplugin("session")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(getattr(session, "exitstatus", 1)))
