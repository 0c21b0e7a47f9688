"""The I/O threads of a machine: they do not wait for one another, and stand and end together."""

from __future__ import annotations

import threading
import time

from qemu_user.backends.io_threads import IoThreads


def test_a_blocked_thread_holds_up_nobody_else() -> None:
    errors: list[BaseException] = []
    threads = IoThreads(errors.append)
    disk = threads.add("disk")
    threads.start()
    blocked, go_on, served = threading.Event(), threading.Event(), threading.Event()

    def flush() -> None:
        blocked.set()
        go_on.wait(60)

    disk.call_soon(flush)
    assert blocked.wait(60)
    threads.main.call_soon(served.set)
    assert served.wait(60)
    go_on.set()
    threads.join(60)
    threads.close()
    assert not errors


def test_frozen_waits_for_what_is_under_way_and_stops_all() -> None:
    threads = IoThreads(lambda error: None)
    disk = threads.add("disk")
    threads.start()
    late = threads.add("late")  # started at once
    happened: list[str] = []
    begun = threading.Event()
    disk.call_soon(lambda: (begun.set(), time.sleep(0.05), happened.append("flushed")))  # type: ignore[func-returns-value]
    assert begun.wait(60)
    with threads.frozen():
        assert happened == ["flushed"]
        for loop, name in ((threads.main, "main"), (disk, "disk"), (late, "late")):
            loop.call_soon(lambda name=name: happened.append(name))  # type: ignore[misc]
        time.sleep(0.05)
        assert happened == ["flushed"]
    until = time.monotonic() + 60
    while len(happened) < 4 and time.monotonic() < until:
        time.sleep(0.001)
    assert sorted(happened[1:]) == ["disk", "late", "main"]
    threads.join(60)
    threads.close()


def test_stopped_while_frozen_nothing_is_served_any_more() -> None:
    threads = IoThreads(lambda error: None)
    disk = threads.add("disk")
    threads.start()
    happened: list[str] = []
    with threads.frozen():
        disk.call_soon(lambda: happened.append("disk"))
        threads.stop()
    threads.join(60)
    threads.close()
    assert not happened
