"""What tests leave behind, so that pytest ends when its tests have: threads that the interpreter would wait for, processes that
hold its output, a test that no time limit reaches. Used by tests/conftest.py, which is where pytest looks for hooks.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid

import psutil

_VARIABLE = "SOFTKVM_TESTS"
_PATIENCE_SECONDS = 20.0


class Leftovers:
    """Of one run, whose processes are known by a variable of their environment."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        os.environ[_VARIABLE] = self._mark

    def threads(self) -> list[threading.Thread]:
        """Those that would keep this process from ending."""
        return [thread for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon]

    def processes(self) -> list[psutil.Process]:
        """Those that descend from this process, whoever is their parent now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get(_VARIABLE) == self._mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def clear(self) -> list[str]:
        """Wait a while until nothing is left, end the processes that are; what there was."""
        end = time.monotonic() + _PATIENCE_SECONDS
        while (left := (self.threads(), self.processes())) != ([], []) and time.monotonic() < end:
            time.sleep(0.1)
        told = [f"thread {thread.name}: {_stack(thread)}" for thread in left[0]]
        for process in left[1]:
            try:
                told.append(f"process {process.pid}: {' '.join(process.cmdline()) or process.name()}")
                process.kill()
            except psutil.Error:
                continue
        return told


def _stack(thread: threading.Thread) -> str:
    """Where it is: "function (file:line) < caller ..."."""
    frame, places = sys._current_frames().get(thread.ident or 0), []
    while frame is not None and len(places) < 5:
        places.append(f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})")
        frame = frame.f_back
    return " < ".join(places)
