"""Which processes the warm parent stands for: one that has given nothing up, and differs in nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qemu_user.warm import circumstances


def compare_with(code: str) -> None:
    """With a process of ours that has run `code`."""
    program = f"import ctypes, os, resource, sys\n{code}\nprint('up', flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        try:
            circumstances.compare(circumstances.of(os.getpid()), circumstances.of(process.pid))
        finally:
            process.kill()


def test_an_ordinary_one() -> None:
    compare_with("os.chdir('/'); os.umask(0o77); os.setsid()")


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("assert ctypes.CDLL(None).prctl(38, 1, 0, 0, 0) == 0", "NoNewPrivs"),
        ("resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))", "limits"),
        ("os.nice(3)", "nice"),
        ("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})", "Cpus_allowed"),
        ("open('/proc/self/oom_score_adj', 'w').write('500')", "oom_score_adj"),
        ("import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {10})", "SigBlk"),
    ],
)
def test_one_that_differs(code: str, what: str) -> None:
    if what == "Cpus_allowed" and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    with pytest.raises(circumstances.Different, match=what):
        compare_with(code)


def test_another_interpreter() -> None:
    with subprocess.Popen(["sleep", "100"]) as process:
        theirs = circumstances.of(process.pid)
        process.kill()
    with pytest.raises(circumstances.Different, match="exe"):
        circumstances.compare(circumstances.of(os.getpid()), theirs)


def test_variables_that_count() -> None:
    variables = {b"PYTHONPATH": b"/a", b"HOME": b"/b", b"LC_ALL": b"C", b"LANG": b"C", b"TERM": b"dumb", b"LD_PRELOAD": b"x.so"}
    assert sorted(circumstances.variables(variables)) == [b"LANG", b"LC_ALL", b"LD_PRELOAD", b"PYTHONPATH"]


@pytest.mark.parametrize("how", ["SIG_IGN", "SIG_DFL"])
def test_ignored_signals(how: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", f"import signal; signal.signal(1, signal.{how}); print(flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        assert circumstances.ignored(process.pid) & 1 == (how == "SIG_IGN")
        process.kill()
