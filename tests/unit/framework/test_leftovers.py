"""A run of pytest ends, with the right status, whatever its tests leave behind (tests/conftest.py)."""

from __future__ import annotations

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
    assert {passes}
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
    assert {passes}
"""


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        (_CLEAN.format(passes=True), 0, "1 passed"), (_CLEAN.format(passes=False), 1, "1 failed"),
        (_THREAD.format(passes=True), 1, "thread idle: "), (_THREAD.format(passes=False), 1, "thread idle: "),
        (_PROCESS.format(passes=True), 1, ": sleep 10000"), (_PROCESS.format(passes=False), 1, ": sleep 10000"),
        (_DEAF, 1, "in test_it"),
    ],
    ids=["nothing", "nothing, failed", "thread", "thread, failed", "process", "process, failed", "goes on"],
)  # fmt: skip
def test_a_run_ends(source: str, status: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "impatient.py").write_text(_IMPATIENT)
    (tmp_path / "test_it.py").write_text(source)
    program = f"import sys, pytest; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; sys.exit(pytest.main(sys.argv[1:]))"
    words = ["-s", "-p", "tests.conftest", "-p", "impatient", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    command = [sys.executable, "-c", program, *words, "--rootdir", str(tmp_path), str(tmp_path / "test_it.py")]
    # Everybody's output in one pipe, which has no end while somebody holds it.
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, cwd=tmp_path, text=True)
    assert (done.returncode, said in done.stdout) == (status, True), done.stdout
