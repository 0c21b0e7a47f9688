"""Frames whose payload is in many pieces, over both kinds of channel."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from protocol.channel import zmq_socket
from protocol.channel.shared_memory import create_memfd
from qemu_user.migration import messages
from qemu_user.migration.channel import Channel, ChannelError, StreamChannel, ZmqChannel
from qemu_user.migration.connect import refusal

PAGE = 4096


@pytest.fixture(params=["stream", "zmq"])
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Channel, Channel]]:
    if request.param == "stream":
        ours, theirs = socket.socketpair()
        pair: tuple[Channel, Channel] = StreamChannel(ours), StreamChannel(theirs)
        yield pair
    else:
        context = zmq.Context()
        router = zmq_socket.router(context, f"ipc://{tmp_path}/channel")
        dealer = zmq_socket.dealer(context, zmq_socket.bound_to(router))
        pair = ZmqChannel(dealer, is_router=False), ZmqChannel(router, is_router=True)
        yield pair
    for end in pair:
        end.close()
    if request.param == "zmq":
        context.destroy(linger=0)


@pytest.mark.parametrize("new", [False, True], ids=["there", "new"])
@pytest.mark.parametrize("count", [1, 3, 700])
def test_scattered_pages_arrive_where_they_belong(ends: tuple[Channel, Channel], count: int, new: bool) -> None:
    """In memory that is mapped, or in a file of which nothing is there yet."""
    here, there = ends
    runs = [(5 * number, 1 + number % 3) for number in range(count)]
    if count == 3:
        runs.append((15, 200))  # more than goes to a file at once
    memory = bytearray(PAGE * (5 * count + 200))
    for first, pages in runs:
        memory[first * PAGE : (first + pages) * PAGE] = bytes([1 + first % 250]) * PAGE * pages
    view = memoryview(memory)
    parts = [view[first * PAGE : (first + pages) * PAGE] for first, pages in runs]
    payload = [messages.runs_header(runs), *parts]
    sender = threading.Thread(target=here.send, args=(messages.RUNS, len(runs)), kwargs={"payload": payload}, daemon=True)
    sender.start()
    frame = there.receive(60)
    assert frame is not None
    assert (frame.kind, frame.a) == (messages.RUNS, len(runs))
    assert messages.runs_of(there.read_part(8 * len(runs))) == runs
    fd = create_memfd("pages", len(memory))
    arrived = memoryview(mmap.mmap(fd, len(memory)))
    if new:
        with pytest.raises(ChannelError):
            there.read_to(fd, [(0, 1)])
        there.read_to(fd, [(first * PAGE, pages * PAGE) for first, pages in runs])
    else:
        there.read_into(*[arrived[first * PAGE : (first + pages) * PAGE] for first, pages in runs])
    os.close(fd)
    sender.join(60)
    assert arrived == memory
    here.send(messages.ROUND, 7)
    assert (there.receive(60) or frame).a == 7


@pytest.mark.parametrize("stopped", [0.0, 2.5])
def test_who_was_frozen_has_not_waited(stopped: float) -> None:
    """A second of patience, of which SIGSTOP takes nothing."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        ours.close()
        os.write(theirs.fileno(), b".")
        frame = StreamChannel(theirs).receive(1.0)
        os._exit(0 if frame is not None and frame.kind == messages.DONE else 1)
    theirs.close()
    assert ours.recv(1) == b"."
    channel = StreamChannel(ours)
    if stopped:
        time.sleep(0.05)
        os.kill(child, signal.SIGSTOP)
        time.sleep(stopped)
        os.kill(child, signal.SIGCONT)
        channel.send(messages.DONE)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if stopped else 1)
    channel.close()


def test_a_payload_is_read_to_its_end_and_no_further(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    here.send(messages.RUNS, 1, payload=[b"head", b"", b"body"])
    there.receive(60)
    assert there.read_part(4) == b"head"
    with pytest.raises(ChannelError):
        there.read_part(5)
    with pytest.raises(ChannelError):
        there.read_into(memoryview(bytearray(3)))
    room = bytearray(4)
    there.read_into(memoryview(room)[:1], memoryview(bytearray()), memoryview(room)[1:])
    assert room == b"body"
    here.send(messages.ABORT)
    frame = there.receive(60)
    assert frame is not None
    assert there.read() == b""


@pytest.mark.parametrize("said", [True, False])
def test_who_was_hung_up_on_finds_the_reason(ends: tuple[Channel, Channel], said: bool) -> None:
    """It has lain there, behind other frames, while the source was still sending."""
    here, there = ends
    here.send(messages.HELLO)
    assert there.receive(60) is not None
    there.read()
    there.send(messages.ACCEPT, payload=b"yes")
    if said:
        there.send(messages.REJECT, payload=b"no such disk")
    until = time.monotonic() + 60
    found = refusal(here)
    while said and not found and time.monotonic() < until:  # over ZeroMQ it may be on its way
        found = refusal(here)
    assert found == ("no such disk" if said else "")


class _EndsWhileLookedAt:
    """A monitor that is asked just before the other end has its last word and goes."""

    def __init__(self, channel: ZmqChannel, last_word: Callable[[], None]) -> None:
        self._monitor, self._last_word = channel._monitor, last_word
        self._spoken = False

    def poll(self, timeout: int) -> int:
        if not self._spoken:
            self._spoken = True
            self._last_word()
            assert self._monitor.poll(60_000)
        return int(self._monitor.poll(timeout))

    def __getattr__(self, name: str) -> object:
        return getattr(self._monitor, name)


@pytest.mark.parametrize("ends", ["zmq"], indirect=True)
def test_what_was_said_before_the_end_is_heard(ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch) -> None:
    """What has arrived, at least: ZeroMQ may drop what is under way when it closes."""
    here, there = ends
    assert isinstance(here, ZmqChannel)
    here.send(messages.HELLO)
    assert there.receive(60) is not None

    def last_word() -> None:
        there.send(messages.PREPARED)
        assert here._socket.poll(60_000)
        there.close()

    monkeypatch.setattr(here, "_monitor", _EndsWhileLookedAt(here, last_word))
    frame = here.receive(60)
    assert frame is not None
    assert frame.kind == messages.PREPARED
    with pytest.raises(ChannelError, match="gone"):
        here.receive(60)


def test_a_cut_end_reads_nothing_any_more(ends: tuple[Channel, Channel]) -> None:
    """Neither what comes later nor what has arrived: a decision that was lost must not be heard by the one who lost it."""
    here, there = ends
    here.send(messages.DONE)
    assert there.receive(60) is not None
    there.send(messages.DONE)
    time.sleep(0.1)  # it lies there
    here.cut()
    with pytest.raises(ChannelError):
        here.receive(60)
