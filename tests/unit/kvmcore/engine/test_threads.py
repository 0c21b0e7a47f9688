"""Harts and threads: kicks, quiesce, atomics between harts, remote flushes."""

from __future__ import annotations

import threading
import time

import pytest

from kvmcore.engine import hart_state
from kvmcore.engine.exits import ExitKind
from kvmcore.engine.machine import Hart
from kvmcore.engine.reference_hart import InterpretedHart
from tests.framework.bare_guest import RAM

SPIN = "1: addi t0, t0, 1\n j 1b"
COUNTER = RAM + 0x10_0000


def test_a_kick_ends_the_run_that_runs(guest):
    g = guest(SPIN)
    started = time.monotonic()
    assert g.run(seconds=0.2) == ExitKind.KICK
    assert time.monotonic() - started < 60


def test_a_kick_before_the_run_counts_once(guest):
    g = guest("ecall")
    g.harts[0].kick()
    g.harts[0].kick()
    assert g.run() == ExitKind.KICK
    assert g.run() == ExitKind.ECALL


def test_no_kick_is_lost(guest):
    g = guest(SPIN)
    hart, seen = g.harts[0], threading.Semaphore(0)

    def runner() -> None:
        for _ in range(300):
            assert hart.run() == ExitKind.KICK
            seen.release()

    thread = threading.Thread(target=runner, daemon=True)
    thread.start()
    for _ in range(300):
        hart.kick()
        assert seen.acquire(timeout=60)
    thread.join(60)
    assert not thread.is_alive()


def test_kicks_and_quiesce_do_not_eat_each_other(guest):
    g = guest(SPIN)
    hart, seen, stop = g.harts[0], threading.Semaphore(0), threading.Event()

    def runner() -> None:
        for _ in range(100):
            assert hart.run() == ExitKind.KICK
            seen.release()

    def disturber() -> None:
        while not stop.is_set():
            with g.machine.quiesce():
                pass

    threads = [threading.Thread(target=runner, daemon=True), threading.Thread(target=disturber, daemon=True)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            hart.kick()
            assert seen.acquire(timeout=60)
    finally:
        stop.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_nobody_runs_inside_quiesce(guest):
    g = guest(f"li t0, {COUNTER}\n slli t1, a0, 3\n add t0, t0, t1\n 1: ld t2, 0(t0)\n"
        "addi t2, t2, 1\n sd t2, 0(t0)\n j 1b",
              harts=3)  # fmt: skip
    thread = threading.Thread(target=g.run_all, args=(1.5,), daemon=True)
    thread.start()
    for _ in range(20):
        with g.machine.quiesce():
            before = [g[COUNTER + 8 * number] for number in range(3)]
            time.sleep(0.002)
            with g.machine.quiesce():
                assert [g[COUNTER + 8 * number] for number in range(3)] == before
        time.sleep(0.002)
    thread.join()
    assert all(g[COUNTER + 8 * number] > 1000 for number in range(3))


INCREMENTS = {
    "amo": "amoadd.d zero, t1, (t0)",
    "amo.w": "amoadd.w zero, t1, (t0)",
    "lr/sc": "2: lr.d t3, (t0)\n add t3, t3, t1\n sc.d t4, t3, (t0)\n bnez t4, 2b",
    "lock": "3: li t3, 1\n amoswap.w.aq t3, t3, 64(t0)\n".replace("64(t0)", "(t5)")
    + "bnez t3, 3b\n ld t3, 0(t0)\n add t3, t3, t1\n sd t3, 0(t0)\n amoswap.w.rl zero, zero, (t5)",
}


@pytest.mark.parametrize("how", INCREMENTS)
def test_increments_of_all_harts_add_up(guest, how):
    g = guest(
        f"li t0, {COUNTER}\n addi t5, t0, 64\n li t1, 1\n li t2, 20000\n"
        f"1: {INCREMENTS[how]}\n addi t2, t2, -1\n bnez t2, 1b\n ecall",
        harts=4,
    )
    assert g.run_all() == [ExitKind.ECALL] * 4
    assert g[COUNTER] == 4 * 20000


def test_eight_harts_run_at_once(guest):
    g = guest(
        f"li t0, {COUNTER}\n li t1, 1\n amoadd.d zero, t1, (t0)\n li t2, 8\n1: ld t3, 0(t0)\n bltu t3, t2, 1b\n ecall",
        harts=8,
    )
    assert g.run_all() == [ExitKind.ECALL] * 8


def test_a_reservation_ends_with_another_harts_store(guest):
    """lr, then the other hart writes: sc must fail, also when it writes in between to the same word twice."""
    g = guest(f"li t0, {COUNTER}\n lr.d a1, (t0)\n ecall\n li a2, 5\n sc.d a3, a2, (t0)\n ecall")
    assert g.run() == ExitKind.ECALL
    g[COUNTER] = 77
    g.harts[0].advance(4)
    assert g.run() == ExitKind.ECALL
    assert (g.harts[0].state.x[13], g[COUNTER]) == (1, 77)


def test_store_conditional_needs_the_reserved_address_and_size(guest):
    g = guest(
        f"li t0, {COUNTER}\n lr.d a1, (t0)\n addi t1, t0, 8\n sc.d a2, t0, (t1)\n lr.d a1, (t0)\n"
        f"sc.w a3, t0, (t0)\n"
        "sc.d a4, t0, (t0)\n lr.w a1, (t0)\n sc.w a5, zero, (t0)\n ecall"
    )
    assert g.run() == ExitKind.ECALL
    assert [g.harts[0].state.x[number] for number in (12, 13, 14, 15)] == [1, 1, 1, 0]


def test_requested_flushes_are_done_soon(guest):
    g = guest(SPIN)
    thread = threading.Thread(target=g.run, args=(3.0,), daemon=True)
    thread.start()
    hart = g.harts[0]
    for request in (hart.flush_tlb, hart.flush_icache):
        request()
        deadline = time.monotonic() + 60
        while hart.flush_pending and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not hart.flush_pending
    hart.kick()
    thread.join()


def test_an_interrupt_from_another_thread_is_taken(guest):
    g = guest(f"la t0, handler\n csrw stvec, t0\n csrsi sie, 2\n csrsi sstatus, 2\n {SPIN}\n .balign 4\nhandler: ecall")
    threading.Timer(0.1, g.harts[0].set_pending, (1,)).start()
    assert g.run() == ExitKind.ECALL
    assert g.harts[0].state.scause == 1 << 63 | 1


IMSIC = 0x2800_0000


def interrupt_file(g, number: int) -> None:
    """Hart `number` gets an IMSIC that delivers identity 5."""
    hart = g.harts[number]
    hart.enable_imsic(63)
    hart.write_imsic("eie", 0, 1 << 5)
    hart.write_imsic("eidelivery", 0, 1)


def test_an_msi_to_a_running_hart_needs_no_exit(guest):
    """Hart 0 waits for hart 1 to run, then sends; hart 1 takes the interrupt, claims it and says so."""
    g = guest(
        f"""li s0, {COUNTER}
        li s1, {IMSIC + 4096}
        li s2, 200
        bnez a0, second
        1: ld t0, 0(s0)
        beq t0, s3, 1b
        mv s3, t0
        li t1, 5
        sw t1, 0(s1)
        bne s3, s2, 1b
        ecall
        second: la t0, handler
        csrw stvec, t0
        li t0, 512
        csrs sie, t0
        csrsi sstatus, 2
        2: addi s3, s3, 1
        sd s3, 0(s0)
        li s4, 0
        3: beqz s4, 3b
        bne s3, s2, 2b
        ecall
        .balign 4
        handler: csrrw t2, stopei, zero
        srli s4, t2, 16
        sret""",
        harts=2,
    )
    interrupt_file(g, 1)
    g.machine.set_imsics({IMSIC: g.harts[0], IMSIC + 4096: g.harts[1]})
    threads = [threading.Thread(target=g.run, args=(20.0, hart), daemon=True) for hart in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert g.harts[1].state.x[19] == 200
    assert [hart.state.exit_kind for hart in g.harts] == [ExitKind.ECALL] * 2


def test_an_msi_to_a_hart_outside_is_no_exit(guest):
    g = guest(f"li s1, {IMSIC + 4096}\n li t1, 5\n sw t1, 0(s1)\n ecall", harts=2)
    interrupt_file(g, 1)
    g.machine.set_imsics({IMSIC: g.harts[0], IMSIC + 4096: g.harts[1]})
    before = g.harts[1].state.wake
    assert g.run() == ExitKind.ECALL
    assert g.harts[1].read_imsic("eip", 0) == 1 << 5
    assert g.harts[1].state.wake != before  # a thread that sleeps for this hart looks around


def test_an_msi_for_an_identity_that_is_not_there_is_an_exit(guest):
    g = guest(f"li s1, {IMSIC + 4096}\n li t1, 64\n sw t1, 0(s1)\n ecall", harts=2)
    interrupt_file(g, 1)
    g.machine.set_imsics({IMSIC: g.harts[0], IMSIC + 4096: g.harts[1]})
    assert g.run() == ExitKind.MMIO_WRITE


def test_no_msi_is_lost_on_the_way_to_sleep(guest):
    """Hart 1 does nothing but wfi; each MSI must end one, whether or not it slept already."""
    g = guest(
        f"""li s0, {COUNTER}
        li s1, {IMSIC + 4096}
        li s2, 2000
        bnez a0, second
        1: addi s3, s3, 1
        li t1, 5
        sw t1, 0(s1)
        2: ld t0, 0(s0)
        bne t0, s3, 2b
        bne s3, s2, 1b
        ecall
        second: li t0, 512
        csrs sie, t0
        3: wfi
        csrrw t2, stopei, zero
        beqz t2, 3b
        addi s3, s3, 1
        sd s3, 0(s0)
        bne s3, s2, 3b
        ecall""",
        harts=2,
    )
    interrupt_file(g, 1)
    g.machine.set_imsics({IMSIC: g.harts[0], IMSIC + 4096: g.harts[1]})

    def second() -> None:
        while True:
            seen = g.harts[1].state.wake
            if g.run(20, 1) != ExitKind.WFI:
                return
            g.harts[1].sleep(seen, 10_000_000_000)

    threads = [threading.Thread(target=g.run, args=(20.0, 0), daemon=True), threading.Thread(target=second, daemon=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert g.harts[1].state.x[19] == 2000


def test_a_loop_of_pauses_gives_the_core_away_and_goes_on(guest):
    """Hart 0 waits in a pause loop until the host, which has seen it asleep meanwhile, has written."""
    g = guest(f"""li s0, {COUNTER}
        1: ld t0, 0(s0)
        pause
        beqz t0, 1b
        ecall""")
    seen = threading.Event()

    def host() -> None:
        until = time.monotonic() + 60
        while not g.harts[0].state.sleeping and time.monotonic() < until:
            pass
        if g.harts[0].state.sleeping:
            seen.set()
        g[COUNTER] = 1

    thread = threading.Thread(target=host, daemon=True)
    thread.start()
    assert g.run(20) == ExitKind.ECALL
    thread.join()
    assert seen.is_set()


def test_pauses_far_apart_are_no_loop(guest):
    g = guest("""li s0, 3000
        1: pause
        li t0, 600
        2: addi t0, t0, -1
        bnez t0, 2b
        addi s0, s0, -1
        bnez s0, 1b
        ecall""")
    assert g.run(20) == ExitKind.ECALL
    assert g.harts[0].state.pauses == 0


def test_a_kick_ends_code_without_branches(guest):
    """512 GB of addresses that all lead to one page of nops: nothing to branch, for minutes."""
    g = guest("")
    nops, leaf, middle, root = (RAM + page * 0x1000 for page in (16, 17, 18, 19))
    g.put(nops, "nop\n" * 1024)
    for index in range(512):
        g[leaf + 8 * index] = nops >> 12 << 10 | 0xCF  # V R W X A D
        g[middle + 8 * index] = leaf >> 12 << 10 | 1
        g[root + 8 * index] = middle >> 12 << 10 | 1
    g.harts[0].state.satp, g.harts[0].state.pc = 8 << 60 | root >> 12, 0
    begin = time.monotonic()
    assert g.run(0.05) == ExitKind.KICK
    assert time.monotonic() - begin < 60
    g.harts[0].be_brief()
    assert g.run() == ExitKind.KICK, "nor does it outlast a brief run"


@pytest.mark.parametrize("kind", [Hart, InterpretedHart])
def test_a_brief_run_ends_though_the_guest_only_traps(guest, kind):
    g = guest("1: j 1b", kind=kind)
    g.harts[0].state.pc = 0x1000  # nothing is there, at stvec (0) neither
    g.harts[0].be_brief()
    assert g.run() == ExitKind.KICK
    g.harts[0].be_no_longer_brief()
    before = g.harts[0].state.icount
    g.harts[0].state.pc = RAM
    g.harts[0].be_brief()
    assert g.run() == ExitKind.KICK
    assert 0 < g.harts[0].state.icount - before <= hart_state.SLICE + 64
