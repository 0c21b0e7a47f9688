"""A run of pytest ends, with the right status, whatever its tests leave behind (tests/conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
_IMPATIENT = """
from tests import conftest
from tests.framework import leftovers
conftest._GRACE_SECONDS, leftovers._PATIENCE_SECONDS = 0.5, 0.5
"""
_THREAD = """
import threading, time
def test_it():
    threading.Thread(target=time.sleep, args=(10_000,), name="idle").start()
    assert {passes}
"""
_PROCESS = """
import subprocess, sys
def test_it():
    subprocess.Popen(["sleep", "10000"])
"""
_DEAF = """
import signal, time, pytest
@pytest.mark.timeout(0.5)
def test_it():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(10_000)
"""
_CLEAN = """
import subprocess, threading, time
def test_it():
    threading.Thread(target=time.sleep, args=(0.1,)).start()
    threading.Thread(target=time.sleep, args=(10_000,), daemon=True).start()
    subprocess.Popen(["true"])
"""


@pytest.mark.parametrize(
    ("source", "processes", "status", "said"),
    [
        (_CLEAN, 2, 0, "1 passed"), (_THREAD.format(passes=True), 2, 1, "thread idle: "),
        (_THREAD.format(passes=False), 0, 1, "thread idle: "), (_PROCESS, 0, 1, ": sleep 10000"), (_DEAF, 0, 1, "in test_it"),
    ],
    ids=["nothing", "a thread", "a thread of a failed test", "a process", "a test that goes on"],
)  # fmt: skip
def test_a_run_ends(source: str, processes: int, status: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "impatient.py").write_text(_IMPATIENT)
    (tmp_path / "test_it.py").write_text(source)
    program = f"import sys, pytest; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; sys.exit(pytest.main(sys.argv[1:]))"
    words = ["-s", "-p", "tests.conftest", "-p", "impatient", "-p", "no:cacheprovider", "-n", str(processes)]
    words += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), str(tmp_path / "test_it.py")]
    # Everybody's output in one pipe, which has no end while somebody holds it.
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, cwd=tmp_path, text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")},
    )  # fmt: skip
    assert (done.returncode, said in done.stdout) == (status, True), done.stdout
