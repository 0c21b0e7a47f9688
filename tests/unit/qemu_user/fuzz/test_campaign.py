"""A short run against a real daemon: sequences are performed, oracles see faults, nothing is left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from errno import EBADF
from pathlib import Path
from random import Random

import psutil
import pytest

from protocol.abi.ioctls import BY_NAME
from protocol.client import Kvm
from protocol.codec import control
from qemu_user.cli import fuzz
from qemu_user.fuzz import rules, transport
from qemu_user.fuzz.campaign import Campaign, perform
from qemu_user.fuzz.corpus import Corpus
from qemu_user.fuzz.daemon import Daemon
from qemu_user.fuzz.executor import KINDS, Executor, Kind, Outcome
from qemu_user.fuzz.grammar import Grammar
from qemu_user.fuzz.minimize import as_test
from qemu_user.fuzz.oracles import Bystander, judge
from qemu_user.fuzz.report import write
from qemu_user.fuzz.sequence import Finding, Op, load, save


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as made:
        yield made
        assert made.alive
        assert made.close() == []


def test_a_run_finds_nothing_and_keeps_a_corpus(daemon: Daemon, tmp_path: Path) -> None:
    campaign = Campaign(tmp_path / "out", 11, daemon, daemon.endpoint, attacks=False, corpus=Corpus(tmp_path / "corpus"))
    figures = campaign.run(120, most=60)
    campaign.close()
    findings = [load(path)[0]["text"] for path in (tmp_path / "out" / "findings").glob("*")]
    assert findings == []
    assert figures.sequences == 60
    assert figures.operations > 600
    assert len(Corpus(tmp_path / "corpus")) == figures.corpus > 0
    assert "<svg" in write(tmp_path / "out").read_text()


@pytest.mark.parametrize("attack", transport.ATTACKS, ids=lambda attack: attack.__name__.strip("_"))
def test_attacks_are_stood(daemon: Daemon, attack: object) -> None:
    kvm = Kvm.open(daemon.endpoint)
    try:
        attack(kvm, daemon.endpoint, Random(3))  # type: ignore[operator]
    except OSError:
        pass  # refused
    finally:
        kvm.close()
    transport.serves(daemon.endpoint, "the attack")
    assert daemon.complaints() == ""


def test_a_killed_vm_is_a_crash(daemon: Daemon) -> None:
    executor = Executor(daemon.endpoint)
    start = executor.start

    def start_and_kill():  # type: ignore[no-untyped-def]
        run = start()
        os.kill(run.pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(run.pid)] if psutil.pid_exists(run.pid) else [], timeout=60)
        return run

    executor.start = start_and_kill  # type: ignore[method-assign]
    finding = perform(executor, [Op("ioctl", ("vm", 0), "CHECK_EXTENSION", arg=1)])
    executor.close()
    assert finding is not None
    assert finding.oracle == "crash"
    assert finding.text.endswith("the process has ended"), "before the ioctl, or in the middle of it"


def test_the_bystander_notices(daemon: Daemon) -> None:
    bystander = Bystander(daemon.endpoint)
    assert bystander.check() is None
    bystander._state ^= 1
    found = bystander.check()
    bystander.close()
    assert found is not None
    assert found.oracle == "bystander"


def test_what_the_table_does_not_have_is_a_finding() -> None:
    op = Op("ioctl", ("vm", 0), "IRQ_LINE", members={})
    assert judge(op, Outcome(-1, "ENXIO"), 0) is None
    assert judge(op, Outcome(-1, "ENOSPC"), 0) is not None
    assert judge(op, Outcome(5), 0) is not None
    assert judge(op, Outcome(-1, "EIO", reason="internal error, see kvmcore's log"), 0) is not None


def test_attributes_that_an_imsic_does_not_have(daemon: Daemon) -> None:
    """Found when AIAs were brought up: HAS_DEVICE_ATTR answers ENOENT, EINVAL and EOPNOTSUPP, which the table did not say."""
    attributes = [(0, 1, 127), (0, 2, 31), (1, 0, 0x0C000000), (1, 1, 0x28000000), (2, 0, 0)]
    ops = [Op("ioctl", ("vm", 0), "CREATE_DEVICE", members={"type": 11}), Op("ioctl", ("vm", 0), "CREATE_VCPU")]
    for group, attr, value in attributes:
        data = {"in": value.to_bytes(8, "little").hex()}
        ops.append(Op("ioctl", ("device", 0), "SET_DEVICE_ATTR", members={"group": group, "attr": attr, "addr": data}))
    ops += [Op("ioctl", ("device", 0), "HAS_DEVICE_ATTR", members={"group": 4, "attr": attr}) for attr in (5, 0x81, 0x70)]
    ops.append(Op("ioctl", ("device", 0), "HAS_DEVICE_ATTR", members={"group": 3, "attr": 6}))
    executor = Executor(daemon.endpoint)
    run = executor.start()
    outcomes = list(run.perform_all(ops))
    run.close()
    executor.close()
    assert [outcome.errno for outcome in outcomes] == [""] * 7 + ["ENOENT", "EINVAL", "", "EOPNOTSUPP"]
    assert [judge(op, outcome, 0) for op, outcome in zip(ops, outcomes, strict=True)] == [None] * 11


@pytest.mark.parametrize("close_vm", [False, True], ids=["", "the VM's own handle is closed before"])
def test_a_sequence_leaves_nothing(daemon: Daemon, close_vm: bool) -> None:
    """What it has made, by whatever request, is closed when the next one begins, and its memory is unmapped."""
    vm, vcpu = ("vm", 0), ("vcpu", 0)
    ops = [
        Op("ioctl", vm, "CREATE_VCPU"), Op("ioctl", vm, "GET_STATS_FD"), Op("ioctl", vcpu, "GET_STATS_FD"),
        Op("control", vm, extra={"request": control.DUP}), Op("control", vcpu, extra={"request": control.DUP}),
        Op("ioctl", ("system", 0), extra={"request": BY_NAME["CREATE_VM"].number}),
        Op("ioctl", vm, extra={"request": BY_NAME["CREATE_VCPU"].number}, arg=1),
        Op("say", vm, arg=0x7000_0000, extra={"op": 2, "b": 4096, "d": 1, "fds": ["sealed"]}),
        *[Op("close", vm)] * close_vm,
    ]  # fmt: skip
    executor = Executor(daemon.endpoint)
    run = executor.start()
    outcomes = list(run.perform_all(ops))
    made = [number for numbers in run.made.values() for number in numbers if number != run.place.system]
    run.close()
    executor.quiet()
    assert [outcome.errno for outcome in outcomes] == [""] * len(ops)
    wire = run.place.wire
    for number in [*made, *(outcomes[at].ret for at in (3, 4, 5, 6))]:
        sequence, frame = wire.frame(number, control.CLOSE)
        wire.send(frame)
        reply = wire.wait(sequence)
        assert reply is not None
        assert reply.errno == EBADF
    again = executor.start()
    assert [outcome.errno for outcome in again.perform_all(ops[7:8])] == [""]
    again.close()
    executor.close()


def test_memory_is_mapped_again_in_one_message(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory that was written is unmapped and mapped again it is all zeros, and nobody has waited for the answers."""
    vm, gpa = ("vm", 0), 0x8000_0000
    region = {"slot": 0, "guest_phys_addr": gpa, "memory_size": rules.MAP_SIZE, "userspace_addr": {"map": 0}}
    ops = [
        Op("map", vm, arg=0), Op("ioctl", vm, "SET_USER_MEMORY_REGION", members=region),
        Op("control", vm, arg=gpa, tail="ff" * 8, extra={"request": control.WRITE_GPA}),
        Op("unmap", vm, arg=0), Op("map", vm, arg=0), Op("map", vm, arg=0),
    ]  # fmt: skip
    executor = Executor(daemon.endpoint)
    messages: list[int] = []
    for done, refused in ((ops, "EEXIST"), (ops[:2], "")):  # the second one has the memory of the first
        run = executor.start()
        batch = run.wire.batch
        monkeypatch.setattr(run.wire, "batch", lambda frames, batch=batch: messages.append(len(frames)) or batch(frames))
        assert [outcome.errno for outcome in run.perform_all(done)] == [""] * (len(done) - 1) + [refused]
        sequence, frame = run.wire.frame(run.made["vm"][0], control.READ_GPA, gpa, payload=control.LENGTH.pack(8))
        run.wire.send(frame)
        reply = run.wire.wait(sequence)
        assert reply is not None
        assert reply.extra == bytes(8)
        run.close()
        monkeypatch.undo()
    executor.close()
    assert len(messages) == 3  # the third map is a message of its own: both memories may be in use


def test_replay_says_that_there_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "f.jsonl", Grammar(5).sequence(1))
    assert fuzz.main(["replay", str(tmp_path / "f.jsonl")]) == 0
    assert "no finding" in capsys.readouterr().out
    assert fuzz.main(["replay", str(tmp_path / "absent")]) == 2


def test_coverage_grows_with_what_is_done(tmp_path: Path) -> None:
    with Daemon(coverage=True) as watched:
        before = watched.covered()
        executor = Executor(watched.endpoint)
        region = {"slot": 0, "memory_size": 4096, "userspace_addr": 0x1000}
        assert perform(executor, [Op("ioctl", ("vm", 0), "SET_USER_MEMORY_REGION", members=region)]) is None
        once = watched.covered()
        unaligned = region | {"memory_size": 1}
        assert perform(executor, [Op("ioctl", ("vm", 0), "SET_USER_MEMORY_REGION", members=unaligned)]) is None
        refused = watched.covered()
        corpus, end = Corpus(tmp_path, watched.covered), time.monotonic() + 120
        while corpus.consider([], new_state=False):  # what the daemon does of itself, a spare process for example
            assert time.monotonic() < end
            time.sleep(0.1)
        executor.close()
        assert 0 < before < once < refused


def test_a_finding_is_performed_again_in_its_kind_of_session(daemon: Daemon, tmp_path: Path) -> None:
    assert [Kind.of(kind.header)[:2] for kind in KINDS] == [kind[:2] for kind in KINDS]
    assert KINDS[0].header == {}
    memfd = [Op("ioctl", ("vm", 0), "CREATE_GUEST_MEMFD", members={"size": 4096})]
    for header, errno in (({}, ""), ({"compat": "6.12"}, "EINVAL")):
        executor = Executor(daemon.endpoint, kinds=(Kind.of(header),))
        run = executor.start()
        assert [outcome.errno for outcome in run.perform_all(memfd)] == [errno]
        run.close()
        executor.close()
    save(tmp_path / "f.jsonl", memfd, compat="none of ours")
    assert fuzz.main(["replay", str(tmp_path / "f.jsonl")]) == 2
    test = as_test(memfd, Finding("model", "x"), "x", {"compat": "6.12"})
    compile(test, "test_x.py", "exec")
    assert 'Kind.of({"compat": "6.12"})' in test
