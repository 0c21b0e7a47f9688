"""I/O threads that look into queues instead of sleeping: who is called when, what looks in vain cost, and that nobody else
starves.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator

import pytest

from kvmcore.vm.vdso import vdso_fd
from protocol.channel.vdso import Vdso
from qemu_user.backends import polling
from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.polling import Poller, Watched


def fail(error: BaseException) -> None:
    raise error


class Queue:
    """A word as a driver would move it on, and what the loop calls. `again`: it is looked at again after each call."""

    def __init__(self, loop: IoLoop, again: bool = True) -> None:
        self.loop, self.again = loop, again
        self.word = ctypes.c_uint16(0)
        self.log: list[str] = []
        self.watched = Watched(self._serve, lambda: self.log.append("settle"), lambda: self.log.append("rest"))

    def watch(self) -> bool:
        return self.loop.watch(self.watched, ctypes.addressof(self.word), self.word.value)

    def _serve(self) -> None:
        self.log.append("serve")
        if self.again:
            self.watch()


@pytest.fixture
def loop() -> Iterator[IoLoop]:
    made = IoLoop(fail)
    made.poller = Poller(Vdso(vdso_fd()))
    made._thread_id = threading.get_ident()  # turn() is called by hand
    made.poller._budget = 1.0
    yield made
    made.close()


def test_more_is_served_without_a_call(loop: IoLoop) -> None:
    queue = Queue(loop)
    assert queue.watch()
    queue.word.value = 1
    loop.turn(0)
    assert queue.log == ["serve"]
    assert loop.poller.streaming
    queue.word.value = 2
    loop.turn(0)
    assert queue.log == ["serve", "serve"]


def test_a_look_in_vain_ends_with_a_rest(loop: IoLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(loop)
    budget = loop.poller._budget
    assert queue.watch()
    loop.turn(0)
    # Where somebody else has the core there is no time to settle: rest() tells the driver as well.
    assert queue.log in (["settle", "rest"], ["rest"])
    assert not loop.poller.watching
    assert not loop.poller.streaming
    assert loop.poller._budget < budget
    queue.word.value = 1
    loop.turn(0)
    assert queue.log[-1] == "rest", "it is not looked at any more"


def test_one_of_two_queues(loop: IoLoop) -> None:
    first, second = Queue(loop, again=False), Queue(loop, again=False)
    assert first.watch()
    assert second.watch()
    second.word.value = 1
    loop.turn(0)
    assert (first.log, second.log) == ([], ["serve"])
    assert loop.poller.watching
    first.word.value = 9
    loop.turn(0)
    assert (first.log, second.log) == (["serve"], ["serve"])
    assert not loop.poller.watching


def test_looks_that_cannot_be_afforded_are_refused(loop: IoLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr(polling.time, "monotonic", lambda: now[0])
    loop.poller._budget, loop.poller._at = 0.0, now[0]
    queue = Queue(loop)
    assert queue.watch()
    loop.turn(0)
    assert not queue.watch(), "the look in vain has to be paid first"
    now[0] += 1.0
    assert queue.watch()
    assert loop.poller._budget <= polling._MOST_SECONDS


def test_other_threads_do_not_look(loop: IoLoop) -> None:
    queue = Queue(loop)
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(queue.watch()), daemon=True)
    thread.start()
    thread.join()
    assert answers == [False]


def test_without_the_code_nobody_looks() -> None:
    loop = IoLoop(fail)
    loop._thread_id = threading.get_ident()
    assert not Queue(loop).watch()
    loop.close()


def test_descriptors_calls_and_timers_are_served_meanwhile(loop: IoLoop) -> None:
    """A queue in which there is always more starves nobody."""
    queue = Queue(loop)
    seen: set[str] = set()
    read, write = os.pipe()
    loop.add_reader(read, lambda: seen.add(os.read(read, 1).decode()))
    loop.call_later(0.0, lambda: seen.add("timer"))
    loop.call_soon(lambda: seen.add("soon"))
    os.write(write, b"x")
    assert queue.watch()
    for _ in range(20):
        queue.word.value += 1
        loop.turn(0)
    assert seen == {"x", "timer", "soon"}
    assert queue.log.count("serve") > 10
    loop.remove(read)
    os.close(read)
    os.close(write)
