"""The translator as a process, hot code that finds it, and its cache: kept, shared, damaged, tampered with, bounded."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmcore.engine import hart_state, hot_code, machine_state
from kvmcore.engine import image as image_file
from kvmcore.engine.code_cache import CodeCache, secret
from kvmcore.engine.exits import ExitKind
from kvmcore.engine.loader import Image, ensure_image
from kvmcore.engine.translation import (
    MAX_ASSEMBLED,
    MAX_KNOWN,
    Answered,
    Assemble,
    Assembled,
    BadMessage,
    Hello,
    Known,
    Later,
    Message,
    Regions,
    Wishes,
    encode_wishes,
    in_memory,
    receive,
    send,
)
from kvmcore.server.translator import WAITING_BYTES
from protocol.channel import fd_passing
from tests.framework.bare_guest import RAM, Guest

ROOT = Path(__file__).parents[4]
LOOP = """
    li a0, 0
    la a2, word
loop:
    ld a3, 0(a2)
    add a0, a0, a3
    addi a0, a0, 1
    j loop
    .balign 8
word: .dword 2
"""


class Process:
    """A translator with a cache of its own in `folder`."""

    def __init__(self, folder: Path) -> None:
        engine = folder / "cache" / "softkvm" / "engine"
        engine.mkdir(parents=True, exist_ok=True)
        ready_made = engine / image_file.path().name
        if not ready_made.exists():
            ready_made.write_bytes(ensure_image().read_bytes())
        self.folder, self.path, self.cache = folder, str(folder / "t"), engine
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "XDG_CACHE_HOME": str(self.folder / "cache")}
        self.memory = os.memfd_create("waiting")
        os.ftruncate(self.memory, WAITING_BYTES)
        command = [sys.executable, "-m", "kvmcore.server.translator", self.path, str(self.memory), str(os.getpid())]
        self.process = subprocess.Popen(command, env=environment, cwd=ROOT, pass_fds=[self.memory])
        end = time.monotonic() + 240
        while not os.path.exists(self.path):
            assert time.monotonic() < end
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.memory)
        Path(self.path).unlink(missing_ok=True)

    @property
    def waiting(self) -> int:
        """What the daemon sees of its work."""
        return int.from_bytes(os.pread(self.memory, WAITING_BYTES, 0), "little")

    @property
    def database(self) -> Path:
        return next(self.cache.glob("*.regions"))


@pytest.fixture
def translator(tmp_path: Path) -> Iterator[Process]:
    made = Process(tmp_path)
    yield made
    made.kill()


def test_who_compiles_gives_way(translator: Process) -> None:
    """It is nicer than who answers, who is as nice as we are."""
    ours, end, nice = os.getpriority(os.PRIO_PROCESS, 0), time.monotonic() + 60, set[int]()
    if ours == 19:
        pytest.skip("nobody can be nicer")
    while len(nice) < 2 and time.monotonic() < end:
        nice = {os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir(f"/proc/{translator.process.pid}/task")}
    assert len(nice) == 2
    assert min(nice) == ours
    assert max(nice) == min(ours + 5, 19)


def run_until_regions(g: Guest, more_than: int = 0, seconds: float = 240) -> int:
    """Run the endless guest until more regions than that are installed; how many there are."""
    assert g.machine.hot_code is not None
    end = time.monotonic() + seconds
    while g.machine.hot_code.regions <= more_than:
        assert time.monotonic() < end, "no region has come"
        assert g.run(0.1) == ExitKind.KICK
    return g.machine.hot_code.regions


def fresh(path: str) -> Guest:
    """A guest that knows the translator, with an image of its own: an arena belongs to an image."""
    g = Guest(Image.load(), LOOP)
    g.machine.translate(path)
    return g


def test_hot_code_is_translated_and_right(translator: Process) -> None:
    g = fresh(translator.path)
    run_until_regions(g)
    state = g.harts[0].state
    before = state.x[10], state.icount, state.pc
    g.run(0.2)
    rounds = (state.icount - before[1]) / 4
    assert abs((state.x[10] - before[0]) / 3 - rounds) <= 1
    assert RAM <= state.pc < RAM + 4096


def test_a_killed_translator_costs_speed_only(translator: Process) -> None:
    g = fresh(translator.path)
    count = run_until_regions(g)
    translator.kill()
    assert g.run(0.3) == ExitKind.KICK
    g.harts[0].flush_icache()
    g.put(g.program.symbols["loop"], "c.nop\n c.nop")  # so that there is something to translate again
    assert g.run(0.3) == ExitKind.KICK
    translator.start()
    assert g.run(1.5) == ExitKind.KICK  # the time after which it is looked for again
    run_until_regions(g, count)


def test_regions_are_kept_on_disk(translator: Process) -> None:
    run_until_regions(fresh(translator.path))
    translator.kill()
    with sqlite3.connect(translator.database) as database:
        (rows,) = database.execute("SELECT count(*) FROM regions").fetchone()
        assert rows > 0
    translator.start()
    run_until_regions(fresh(translator.path))


def test_what_was_tampered_with_is_never_run(translator: Process) -> None:
    run_until_regions(fresh(translator.path))
    translator.kill()
    with sqlite3.connect(translator.database) as database:
        database.execute("UPDATE regions SET code = zeroblob(length(code))")  # zeros would crash the VM process
    translator.start()
    g = fresh(translator.path)
    run_until_regions(g)
    assert g.run(0.2) == ExitKind.KICK
    with sqlite3.connect(translator.database) as database:
        end = time.monotonic() + 240
        while database.execute("SELECT count(*) FROM regions WHERE code <> zeroblob(length(code))").fetchone()[0] == 0:
            assert time.monotonic() < end, "translated again, but not kept"
            time.sleep(0.1)


def test_a_new_vm_begins_with_what_others_have_left(translator: Process) -> None:
    run_until_regions(fresh(translator.path))
    translator.kill()
    translator.start()
    g = fresh(translator.path)
    hot = g.machine.hot_code
    assert hot is not None
    hart = g.harts[0]
    hart.state.sample_count = hart_state.SAMPLES  # none are taken: new pages alone lead there
    end = time.monotonic() + 240
    while not hot.regions:
        assert time.monotonic() < end
        assert g.run(0.01) == ExitKind.KICK
        if not hot.regions:  # the page was entered before the translator's greeting had come
            with g.machine.quiesce():
                g.machine.forget_decoded()
    before = hart.state.x[10], hart.state.icount
    g.run(0.2)
    assert abs((hart.state.x[10] - before[0]) / 3 - (hart.state.icount - before[1]) / 4) <= 1


def test_a_page_that_had_to_go_comes_back_with_its_regions(translator: Process) -> None:
    g = fresh(translator.path)
    run_until_regions(g)
    machine, hot = g.machine, g.machine.hot_code
    assert hot is not None
    hart = g.harts[0]
    for _ in range(3):
        before = hot.regions
        with machine.quiesce():
            machine._give_up_pages(machine._unused_pages())  # there is one
        assert not hot._pages
        hart.state.sample_count = hart_state.SAMPLES  # none are taken: it is not hot again
        assert g.run(0.1) == ExitKind.KICK
        assert hot.regions > before
        hart.state.sample_count = 0


def test_straight_code_is_translated_to_its_end(translator: Process) -> None:
    """Only the loop's head is ever a sample. Each region has 160 instructions."""
    straight = "\n".join(["addi a0, a0, 1"] * 400)
    g = Guest(Image.load(), f"loop:\n{straight}\nj loop\n")
    g.machine.translate(translator.path)
    run_until_regions(g, more_than=2)
    state = g.harts[0].state
    before = state.x[10], state.icount
    g.run(0.2)
    added, done = state.x[10] - before[0], state.icount - before[1]
    assert abs(added / 400 - done / 401) <= 1


def test_straight_code_is_assembled_page_by_page(translator: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pages have no branch that leads into them."""
    monkeypatch.setattr(hot_code, "THRESHOLD", 1 << 40)
    straight = "\n".join(["addi a0, a1, 1"] * 3800)
    g = Guest(Image.load(), f"loop:\n{straight}\nj loop\n")
    g.machine.translate(translator.path)
    hot = g.machine.hot_code
    assert hot is not None
    end = time.monotonic() + 240
    while sum(bool(page.assembled) for page in hot._pages.values()) < 3:
        assert time.monotonic() < end, "pages are not seen"
        g.run(0.1)


@pytest.mark.parametrize("leaves", ["the VM ends", "the pages go"])
def test_what_was_seen_is_translated_in_idle_time(translator: Process, monkeypatch: pytest.MonkeyPatch, leaves: str) -> None:
    monkeypatch.setattr(hot_code, "THRESHOLD", 1 << 40)  # never hot
    g = fresh(translator.path)
    hot = g.machine.hot_code
    assert hot is not None
    end = time.monotonic() + 240
    while not any(page.heat for page in hot._pages.values()):
        assert time.monotonic() < end
        g.run(0.1)
    heat = [dict(page.heat) for page in hot._pages.values()]
    if leaves == "the VM ends":
        hot.close()
        assert [page.heat for page in hot._pages.values()] == heat, "what is wished for may still become hot"
        assert any(page.wished for page in hot._pages.values())
    else:
        hot.pages_go(set(hot._pages))
        assert not hot._pages
        assert any(page.wished for page in hot._away.values())
    with sqlite3.connect(translator.database) as database:
        while not database.execute("SELECT count(*) FROM regions WHERE code != x''").fetchone()[0]:
            assert time.monotonic() < end, "nothing was translated"
            time.sleep(0.1)
    other = fresh(translator.path)
    run_until_regions(other)
    assert not hot.regions, "the one who wished for it is not given it"


def test_what_is_hot_goes_along_to_another_host(translator: Process, tmp_path: Path) -> None:
    here = fresh(translator.path)
    run_until_regions(here)
    assert here.machine.hot_code is not None
    hot = here.machine.hot_code.hot_here()
    assert hot
    other = Process(tmp_path / "other")
    try:
        moved = fresh(other.path)
        assert moved.machine.hot_code is not None
        assert moved.machine.hot_code.hot_here() == b""
        moved.machine.hot_code.hot_elsewhere(hot)  # it has not run a single instruction there
        end = time.monotonic() + 240
        with sqlite3.connect(other.database) as database:
            while not database.execute("SELECT count(*) FROM regions WHERE code != x''").fetchone()[0]:
                assert time.monotonic() < end, "nothing was translated"
                time.sleep(0.1)
        run_until_regions(moved)
        assert moved.machine.hot_code.translated == 0, "it was there already"
        assert moved.machine.hot_code.ready_made > 0
        again = fresh(other.path)
        assert again.machine.hot_code is not None
        again.machine.hot_code.hot_elsewhere(hot)
        again.machine.hot_code.prepare()
        assert again.machine.hot_code.ready_made > 0, "it was not installed before the first instruction"
        assert again.run(0.1) == ExitKind.KICK
        assert again.harts[0].state.count_page == 0
        with pytest.raises(BadMessage):
            moved.machine.hot_code.hot_elsewhere(b"noise")
        assert moved.run(0.1) == ExitKind.KICK
    finally:
        other.kill()


def test_what_is_waiting_can_be_seen(translator: Process) -> None:
    """The daemon stays as long as there is work that is left for idle time."""
    add = bytes.fromhex("3305b500")  # add a0, a0, a1
    page = (add * 100 + bytes.fromhex("67800000")).ljust(4096, b"\0")  # ret
    sock = fd_passing.connect(translator.path)
    fd = in_memory("wishes", encode_wishes(Wishes([(0, 0, page)], [(0, 4 * number) for number in range(8)])))
    send(sock, Later(), [fd])
    os.close(fd)
    seen = {0}
    end = time.monotonic() + 240
    while not (translator.waiting == 0 and len(seen) > 1):
        seen.add(translator.waiting)
        assert time.monotonic() < end
        time.sleep(0.01)
    assert 0 < max(seen) <= 8
    with sqlite3.connect(translator.database) as database:
        assert database.execute("SELECT count(*) FROM regions WHERE code != x''").fetchone()[0] == 8
    sock.close()


def test_wishes_that_cannot_be(translator: Process) -> None:
    """The translator hangs up and goes on serving others."""
    page = bytes(4096)
    bad = [
        Wishes([], [(0, 0)]),
        Wishes([(0, 0, page[1:])], [(0, 0)]),
        Wishes([(0, 0, page)], [(0, 3)]),
        Wishes([(0, 0, page)], [(0, 4096)]),
        Wishes([(0, 0, page)], [(0, 0)] * 2000),
    ]
    for content in [*(encode_wishes(wishes) for wishes in bad), b"", b"noise"]:
        sock = fd_passing.connect(translator.path)
        fd = in_memory("wishes", content)
        send(sock, Later(), [fd])
        os.close(fd)
        sock.setblocking(True)
        sock.settimeout(60)
        while data := sock.recv(1 << 17):
            assert data
        sock.close()
    run_until_regions(fresh(translator.path))


# -- template code -----------------------------------------------------------------------------------------------

MANY_PAGES = """
    li s0, 0
    li s1, {rounds}
    la s2, pages
    li s4, 4096
round:
    mv s3, s2
    li s5, {pages}
each:
    jalr ra, 0(s3)
    add s3, s3, s4
    addi s5, s5, -1
    bnez s5, each
    addi s1, s1, -1
    bnez s1, round
    ecall
    .balign 4096
pages:
"""
FUNCTION = """
    li t0, {times}
again{number}:
    addi s0, s0, {number}
    andi t1, t0, 1
    beqz t1, even{number}
    addi s0, s0, 1
even{number}:
    addi t0, t0, -1
    bnez t0, again{number}
    ret
    .balign 4096
"""


def test_pages_are_assembled_while_others_go(translator: Process) -> None:
    """Two harts on more pages than the pool holds, so that pages go and come back, with and without template code."""
    pages, times, rounds = 60, 2000, 60
    functions = [FUNCTION.format(times=times, number=number) for number in range(pages)]
    source = MANY_PAGES.format(rounds=rounds, pages=pages) + "".join(functions)
    g = Guest(Image.load(), source, harts=2, pool_bytes=40 * machine_state.PAGE_STRIDE)
    g.machine.translate(translator.path)
    hot = g.machine.hot_code
    assert hot is not None
    assert g.run_all(120) == [ExitKind.ECALL] * 2
    for hart in g.harts:
        assert hart.state.x[8] == rounds * (times * sum(range(pages)) + pages * times // 2)
    assert g.harts[0].state.icount == g.harts[1].state.icount
    assert g.machine.pages_given_up > 0
    assert hot.cold.pages > pages


def talk(sock: socket.socket, message: Message | None = None) -> Message | None:
    """Say something, if anything; what is said next. None: the translator has hung up."""
    if message is not None:
        send(sock, message)
    end = time.monotonic() + 240
    while time.monotonic() < end:
        try:
            said, fds = receive(sock)
        except BlockingIOError:
            time.sleep(0.001)
            continue
        for fd in fds:
            os.close(fd)
        return said
    raise AssertionError("nothing is said")


def test_many_pages_are_one_question(translator: Process) -> None:
    g = fresh(translator.path)
    run_until_regions(g)
    hot = g.machine.hot_code
    assert hot is not None
    (page,) = hot._pages.values()
    sock = fd_passing.connect(translator.path)
    assert isinstance(talk(sock), Hello)
    said = talk(sock, Known([(number, bytes(16)) for number in range(100)] + [(100, page.identity)] + [(101, bytes(16))]))
    assert isinstance(said, Regions)
    assert (said.page, said.identity, said.offset) == (100, page.identity, -1)
    assert {head for head, _ in said.regions} >= page.heads
    assert isinstance(talk(sock), Answered)
    assert isinstance(talk(sock, Known([(0, bytes(16))])), Answered)
    send(sock, Known([(number, bytes(16)) for number in range(MAX_KNOWN + 1)]))
    assert talk(sock) is None
    sock.close()


def test_when_template_code_begins_anew_regions_are_not_asked_for_again(translator: Process) -> None:
    g = fresh(translator.path)
    run_until_regions(g)
    hot = g.machine.hot_code
    assert hot is not None
    g.put(RAM + 4096, "1: addi a1, a1, 1\n j 1b")  # no region is asked for so soon
    g.harts[0].state.pc = RAM + 4096
    end = time.monotonic() + 60
    while not any(page.asked for page in hot._pages.values()):
        assert g.run(0.02) == ExitKind.KICK
        assert time.monotonic() < end
    asked = {page.identity for page in hot._pages.values() if page.asked}
    before = hot._templates
    sock = fd_passing.connect(translator.path)
    assert isinstance(talk(sock), Hello)
    load, number = bytes.fromhex("83b58500"), 0
    while not isinstance(talk(sock, Assemble(
        [(0, (number + i).to_bytes(4, "little") + load * 1023, b"\xff" * 256) for i in range(MAX_ASSEMBLED)]
    )), Hello):  # fmt: skip
        number += MAX_ASSEMBLED
    while hot._templates == before:
        assert g.run(0.02) == ExitKind.KICK
        assert time.monotonic() < end
    known = {page.identity: page for page in (*hot._away.values(), *hot._pages.values())}
    assert all(known[identity].asked for identity in asked)
    sock.close()


def test_when_the_memory_is_full_a_new_one_begins(translator: Process) -> None:
    sock = fd_passing.connect(translator.path)
    first = talk(sock)
    assert isinstance(first, Hello)
    load = bytes.fromhex("83b58500")  # ld a1, 8(a1)
    number, said = 0, first
    while not (isinstance(said, Hello) and said.templates == first.templates + 1):
        assert number < 4096
        pages = [(0, (number + i).to_bytes(4, "little") + load * 1023, b"\xff" * 256) for i in range(MAX_ASSEMBLED)]
        number += MAX_ASSEMBLED
        said = talk(sock, Assemble(pages))
        assert isinstance(said, Hello | Assembled)
    answer = talk(sock, Assemble([(7, load * 1024, b"\xff" * 256)]))
    assert isinstance(answer, Assembled)
    assert answer.templates == said.templates
    assert [page for page, _, _ in answer.pages] == [7]
    sock.close()


@pytest.mark.parametrize("page", [(0, bytes(4095), bytes(256)), (0, bytes(4096), bytes(255)), (0, b"", b"")])
def test_pages_that_cannot_be(translator: Process, page: tuple[int, bytes, bytes]) -> None:
    sock = fd_passing.connect(translator.path)
    assert isinstance(talk(sock), Hello)
    assert talk(sock, Assemble([page])) is None
    sock.close()
    sock = fd_passing.connect(translator.path)
    assert isinstance(talk(sock), Hello)
    assert talk(sock, Assemble([(0, bytes(4096), bytes(256))] * (MAX_ASSEMBLED + 1))) is None
    sock.close()


# -- the cache alone ---------------------------------------------------------------------------------------------

PAGE = bytes(range(16))


def test_find_and_store(tmp_path: Path) -> None:
    key = secret(tmp_path)
    assert secret(tmp_path) == key
    assert (tmp_path / "secret").stat().st_mode & 0o77 == 0
    cache = CodeCache(key, tmp_path)
    assert cache.find(PAGE) == {}
    cache.store(PAGE, 4, b"code")
    cache.store(PAGE, 8, b"")
    cache.close()
    again = CodeCache(key, tmp_path)
    assert again.find(PAGE) == {4: b"code", 8: b""}
    assert CodeCache(bytes(32), tmp_path).find(PAGE) == {}, "another host's secret"


@pytest.mark.parametrize("damage", [b"", b"not a database at all", None])
def test_a_damaged_file_is_begun_anew(tmp_path: Path, damage: bytes | None) -> None:
    key = secret(tmp_path)
    cache = CodeCache(key, tmp_path)
    for number in range(200):
        cache.store(number.to_bytes(16, "little"), 0, bytes(2000))
    cache.close()
    (path,) = tmp_path.glob("*.regions")
    path.write_bytes(damage if damage is not None else path.read_bytes()[:5000])
    again = CodeCache(key, tmp_path)
    again.find(PAGE)
    again.store(PAGE, 4, b"code")
    third = CodeCache(key, tmp_path)
    assert third.find(PAGE) == {4: b"code"}


def test_the_most_recent_come_first(tmp_path: Path) -> None:
    key = secret(tmp_path)
    old = CodeCache(key, tmp_path)
    for number in range(4):
        old.store(number.to_bytes(16, "little"), 2 * number, bytes([number + 1]) * 100)
    old.store(PAGE, 4, b"")
    old.close()
    cache = CodeCache(key, tmp_path)
    cache.used([(2).to_bytes(16, "little"), PAGE])
    cache.close()
    again = CodeCache(key, tmp_path)
    assert again.recent(150) == [((2).to_bytes(16, "little"), 4, b"\3" * 100)]
    assert len(again.recent(1 << 20)) == 4, "but not the one without code"
    with sqlite3.connect(next(tmp_path.glob("*.regions"))) as database:
        database.execute("UPDATE regions SET code = zeroblob(length(code)) WHERE offset = 4")
    assert {offset for _, offset, _ in again.recent(1 << 20)} == {0, 2, 6}, "tampered with"


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    key = secret(tmp_path)
    first, second = CodeCache(key, tmp_path), CodeCache(key, tmp_path)
    for number in range(50):
        (first if number % 2 else second).store(PAGE, 2 * number, b"x" * number)
    assert first.find(PAGE) == second.find(PAGE) == {2 * number: b"x" * number for number in range(50)}


def test_it_stays_within_its_bound(tmp_path: Path) -> None:
    cache = CodeCache(secret(tmp_path), tmp_path, limit=1 << 20)
    for number in range(400):
        cache.store(number.to_bytes(16, "little"), 0, os.urandom(8000))
    cache.close()
    (path,) = tmp_path.glob("*.regions")
    assert path.stat().st_size < 3 << 20
    assert CodeCache(secret(tmp_path), tmp_path).find((399).to_bytes(16, "little"))


def test_without_a_disk_there_is_no_cache(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    assert len(secret(blocked / "below")) == 32
    cache = CodeCache(bytes(32), blocked / "below")
    cache.store(PAGE, 0, b"code")
    assert cache.find(PAGE) == {}
