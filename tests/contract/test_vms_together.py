"""Sessions whose VMs share a process: each VM is as fresh as one in a process of its own, and nothing of it stays.

And BATCH, by which such clients send many requests in one message.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from protocol.abi import structs_riscv as riscv
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_NAME
from protocol.channel.shared_memory import create_memfd
from protocol.client import Kvm, Vm
from protocol.codec import control, envelope
from protocol.codec.envelope import Reply, Request
from protocol.codec.session import Op
from qemu_user.fuzz.wire import Wire
from tests.framework.full_stack import Daemon

RAM, SIZE = 0x80000000, 1 << 20
_SPIN = (0x0000006F).to_bytes(4, "little")  # j .


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as running:
        yield running


@pytest.fixture
def kvm(daemon: Daemon) -> Iterator[Kvm]:
    made = Kvm.open(daemon.endpoint, together=True)
    yield made
    made.close()


def name_of(call: object, *arguments: object) -> str:
    """The errno's name that a call fails with, "" if it does not."""
    try:
        call(*arguments)  # type: ignore[operator]
    except KvmError as error:
        return error.name
    return ""


def use(vm: Vm) -> None:
    """Memory, a vCPU that runs until it is kicked, an AIA, an eventfd, a statistics file; none of them closed."""
    memory = vm.create_guest_memfd(SIZE)
    vm.set_user_memory_region2(0, RAM, SIZE, 0, 4, memory)
    memory.map()[:4] = _SPIN
    vm.create_device(11)
    vcpu = vm.create_vcpu(0)
    vm.kick(vcpu)
    assert name_of(vcpu.run) == "EINTR"
    event = os.eventfd(0)
    vm.irqfd(event, 1)
    vm.ioeventfd(event, 0x10000000, 4)
    os.close(event)
    vm.ioctl("GET_STATS_FD")
    os.close(memory.fd)
    memory.fd = -1
    vcpu.link.drop(vcpu.channel)


def test_many_wires_in_one_batch(kvm: Kvm) -> None:
    """More than a message and the session's socket hold; what is refused is refused alone."""
    vm = kvm.create_vm()
    vm.create_device(11)
    events = [os.eventfd(0) for _ in range(control.MAX_BATCH + 20)]
    batch = vm.batch()
    answers = [batch.ioeventfd(vm, fd, 0x10000000 + 8 * number, 4, None) for number, fd in enumerate(events)]
    wrong = batch.ioeventfd(vm, events[0], 0x20000000, 3, None)
    again = batch.ioeventfd(vm, events[1], 0x10000000, 4, None)
    matched = batch.ioeventfd(vm, events[1], 0x30000000, 4, 7)
    pin = batch.irqfd(vm, events[2], 1)
    batch.send()
    for answer in (*answers, matched, pin):
        answer.checked()
    assert name_of(wrong.checked) == "EINVAL"
    assert name_of(again.checked) == "EEXIST"
    for number, fd in enumerate(events):
        assert name_of(vm.ioeventfd, fd, 0x10000000 + 8 * number, 4) == "EEXIST"
        os.close(fd)
    vm.close()


def test_many_one_after_the_other_leave_nothing(kvm: Kvm) -> None:
    vm = kvm.create_vm()
    process, first = psutil.Process(vm.pid), vm
    counts = []
    for number in range(60):
        use(vm)
        vm.close()
        vm = kvm.create_vm()
        assert vm.pid == first.pid
        if number in (9, 59):
            counts.append((process.num_fds(), process.num_threads(), len(process.memory_maps(grouped=False))))
    (fds, threads, maps), (more_fds, more_threads, more_maps) = counts
    assert more_fds <= fds + 51, "the client's passed descriptors are its own to close, one each"
    assert more_threads <= threads + 1
    assert more_maps <= maps + 12, "some blocks are kept for the next VM (kvmcore/engine/blocks.py)"


def test_a_new_one_is_fresh(kvm: Kvm) -> None:
    vm = kvm.create_vm()
    use(vm)
    vm.close()
    fresh = kvm.create_vm()
    assert name_of(fresh.read_gpa, RAM, 4) == "EFAULT"
    vcpu = fresh.create_vcpu(0)
    assert vcpu.get_mp_state() == 0
    assert name_of(fresh.create_device, 11) == "", "no AIA, and no vCPU that has run, from the VM before"
    assert name_of(fresh.ioctl, "GET_DIRTY_LOG", bytes(16)) == "ENOENT"


def test_side_by_side_they_are_apart(kvm: Kvm) -> None:
    one, two = kvm.create_vm(), kvm.create_vm()
    assert one.pid == two.pid
    memory = one.create_guest_memfd(SIZE)
    assert name_of(two.set_user_memory_region2, 0, RAM, SIZE, 0, 4, memory) == "EINVAL"
    one.set_user_memory_region2(0, RAM, SIZE, 0, 4, memory)
    vcpu = two.create_vcpu(0)
    assert name_of(one.create_vcpu, 0) == ""
    one.close()
    assert name_of(memory.control, control.CLOSE) == "EBADF"
    assert name_of(one.check_extension, 1) == "EBADF"
    assert vcpu.get_mp_state() == 0
    assert two.check_extension(1) >= 0


def test_sessions_never_share_a_process(daemon: Daemon, kvm: Kvm) -> None:
    other = Kvm.open(daemon.endpoint, together=True)
    mine, theirs = kvm.create_vm(), other.create_vm()
    assert mine.pid != theirs.pid
    stolen = Wire(theirs.link)
    sequence, frame = stolen.frame(mine.number, BY_NAME["CHECK_EXTENSION"].number, 1)
    stolen.send(frame)
    assert (stolen.wait(sequence) or Reply(0, 0, 0)).errno == 9
    stolen.close()
    other.close()
    assert mine.alive


def test_the_process_ends_with_the_session_and_may_be_killed(daemon: Daemon) -> None:
    kvm = Kvm.open(daemon.endpoint, together=True)
    vm = kvm.create_vm()
    os.kill(vm.pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(vm.pid)] if psutil.pid_exists(vm.pid) else [], timeout=60)
    assert name_of(vm.check_extension, 1) == "ECONNRESET"
    again = kvm.create_vm()
    assert again.pid != vm.pid
    kvm.close()
    end = time.monotonic() + 60
    while psutil.pid_exists(again.pid):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_there_is_a_most(kvm: Kvm) -> None:
    kept = [kvm.create_vm() for _ in range(256)]
    assert name_of(kvm.create_vm) == "EMFILE"
    kept[7].close()
    assert name_of(kvm.create_vm) == ""


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wire(kvm: Kvm) -> Iterator[Wire]:
    made = Wire(kvm.create_vm().link)
    yield made
    made.close()


def test_a_batch_is_served_in_order(kvm: Kvm, wire: Wire) -> None:
    vm = kvm.create_vm()
    create, api = BY_NAME["CREATE_VCPU"].number, BY_NAME["CHECK_EXTENSION"].number
    frames = [wire.frame(vm.number, create, 0), wire.frame(vm.number, create, 0), wire.frame(vm.number, api, 9)]
    frames += [wire.frame(99, api), wire.frame(vm.number, 0xAE01)]
    wire.batch([frame for _, frame in frames])
    replies = [wire.wait(sequence) for sequence, _ in frames]
    assert [reply.errno for reply in replies if reply] == [0, 17, 0, 9, 22]


def test_what_runs_answers_later(kvm: Kvm, wire: Wire) -> None:
    vm = kvm.create_vm()
    use(vm)
    vcpu = vm.create_vcpu(1)  # stopped: RUN waits
    run, state = BY_NAME["RUN"].number, BY_NAME["GET_MP_STATE"].number
    frames = [wire.frame(vcpu.number, run), wire.frame(vcpu.number, state)]
    frames.append(wire.frame(vm.number, BY_NAME["CHECK_EXTENSION"].number))
    wire.batch([frame for _, frame in frames])
    assert wire.wait(frames[2][0]) is not None
    assert wire.wait(frames[0][0], 0.05) is None
    vm.kick(vcpu)
    ran = wire.wait(frames[0][0])
    assert ran is not None
    assert ran.errno == 4
    assert wire.wait(frames[1][0]) is not None


@pytest.mark.parametrize(
    ("payload", "errno"),
    [
        (b"\x01", 74),
        (b"\xff\xff\xff\xff", 74),
        (b"\x08\0\0\0abc", 74),
        (b"\0\0\0\0" * 257, 74),
        (b"", 0),
        (b"\0\0\0\0" * 256, 0),
    ],
    ids=["short", "long", "cut", "many", "empty", "full of nothing"],
)
def test_broken_batches(wire: Wire, payload: bytes, errno: int) -> None:
    link = wire.link
    wire.send(envelope.encode_request(Request(link.incarnation, link.session, 77, 0, control.BATCH, 0, payload=payload)))
    reply = wire.wait(77)
    assert reply is not None
    assert reply.errno == errno


def test_a_batch_in_a_batch_is_refused(wire: Wire) -> None:
    link = wire.link
    inner = envelope.encode_request(Request(link.incarnation, link.session, 78, 0, control.BATCH, 0))
    _, good = wire.frame(0, 1)
    wire.batch([inner, good])
    reply = wire.wait(78)
    assert reply is not None
    assert reply.errno == 22


def test_answers_that_do_not_fit_together(kvm: Kvm, wire: Wire) -> None:
    """Five replies of 400 KB each: more than one message holds."""
    vm = kvm.create_vm()
    memory = vm.create_guest_memfd(SIZE)
    vm.set_user_memory_region2(0, RAM, SIZE, 0, 4, memory)
    frames = [wire.frame(vm.number, control.READ_GPA, RAM, payload=control.LENGTH.pack(400_000)) for _ in range(5)]
    wire.batch([frame for _, frame in frames])
    for sequence, _ in frames:
        reply = wire.wait(sequence)
        assert reply is not None
        assert len(reply.extra) == 400_000


def test_a_batch_uses_what_it_makes(kvm: Kvm, wire: Wire) -> None:
    kvm.create_vm()
    system, create = kvm.shared_number, BY_NAME["CREATE_VCPU"].number
    assert system is not None
    vm, vcpu = control.made("vm", 0), control.made("vcpu", 1)
    frames = [wire.frame(system, BY_NAME["CREATE_VM"].number), wire.frame(vm, create, 5), wire.frame(vm, create, 2000)]
    frames += [wire.frame(vm, create, 6), wire.frame(vcpu, control.DUP), wire.frame(vcpu, control.CLOSE)]
    frames += [wire.frame(number, control.CLOSE) for number in (vcpu, control.made("device", 0), 1 << 31 | 7 << 16)]
    wire.batch([frame for _, frame in frames])
    replies = [reply for sequence, _ in frames if (reply := wire.wait(sequence))]
    assert [reply.errno for reply in replies] == [0, 0, 22, 0, 0, 0, 9, 9, 9]
    sequence, frame = wire.frame(vm, create, 7)
    wire.send(frame)
    late = wire.wait(sequence)
    assert late is not None
    assert late.errno == 9, "outside of that batch the number means nothing"


def test_mapping_by_message(kvm: Kvm, wire: Wire) -> None:
    link = wire.link
    memory, size = create_memfd("segment", 8192), 8192
    soft = create_memfd("unsealed", 8192, sealed=False)
    for fd in (memory, soft):
        link.say(Op.PASS_FILE, "pass", fd, fds=[fd])

    def errno(number: int, request: int, va: int, payload: bytes) -> int:
        sequence, frame = wire.frame(number, request, va, payload=payload)
        wire.send(frame)
        reply = wire.wait(sequence)
        assert reply is not None
        return reply.errno

    whole = control.SEGMENT.pack(size, 0, 3)
    assert errno(memory, control.MAP, 0x1000, whole) == 0
    assert errno(memory, control.MAP, 0x2000, whole) == 17
    assert errno(memory, control.MAP, 0x1001, whole) == 22
    assert errno(soft, control.MAP, 0x8000, whole) == 22
    assert errno(60000, control.MAP, 0x8000, whole) == 9
    assert errno(kvm.shared_number or 0, control.MAP, 0x8000, whole) == 22
    assert errno(memory, control.MAP, 0x8000, whole[:8]) == 22
    assert errno(memory, control.MAP, 0x8000, control.SEGMENT.pack(size, 4096, 3)) == 22
    assert errno(0, control.UNMAP, 0x2000, whole) == 22
    assert errno(0, control.UNMAP, 0x1000, whole) == 0
    assert errno(memory, control.CLOSE, 0, b"") == 0
    assert errno(memory, control.CLOSE, 0, b"") == 9
    os.close(memory)
    os.close(soft)


def briefly(wire: Wire, vcpu: int) -> tuple[int, int]:
    """(errno, exit_reason) of a brief RUN."""
    flags = envelope.FLAG_INLINE_PAGE | envelope.FLAG_BRIEF
    sequence, frame = wire.frame(vcpu, BY_NAME["RUN"].number, payload=bytes(32), flags=flags)
    wire.send(frame)
    reply = wire.wait(sequence)
    assert reply is not None
    return reply.errno, int.from_bytes(reply.extra[8:12], "little")


def test_brief_runs(kvm: Kvm, wire: Wire) -> None:
    vm = kvm.create_vm()
    memory = vm.create_guest_memfd(SIZE)
    vm.set_user_memory_region2(0, RAM, SIZE, 0, 4, memory)
    vcpu = vm.create_vcpu(0)
    assert briefly(wire, vcpu.number) == (4, 10), "nothing is at 0: it traps for ever"
    vcpu.set_one_reg(riscv.PC, RAM)
    vm.write_gpa(RAM, _SPIN)
    counts = []
    for _ in range(2):
        vcpu.set_one_reg(riscv.PC, RAM)
        assert briefly(wire, vcpu.number) == (4, 10)
        counts.append(vcpu.get_one_reg(riscv.PC))
    assert counts == [RAM, RAM]
    vm.write_gpa(RAM, (0x10500073).to_bytes(4, "little") + _SPIN)  # wfi
    vcpu.set_one_reg(riscv.PC, RAM)
    assert briefly(wire, vcpu.number)[0] == 4
    vm.write_gpa(RAM, (0x00002023).to_bytes(4, "little"))  # sw zero, 0(zero): no memory there, an MMIO exit
    vcpu.set_one_reg(riscv.PC, RAM)
    assert briefly(wire, vcpu.number) == (0, 6)
    stopped = vm.create_vcpu(1)
    assert briefly(wire, stopped.number)[0] == 4
    event = os.eventfd(0, os.EFD_NONBLOCK)
    vm.ioeventfd(event, 0, 4)
    assert briefly(wire, vcpu.number)[0] == 4  # the store is done, then it spins
    vcpu.set_one_reg(riscv.PC, RAM)
    assert briefly(wire, vcpu.number)[0] == 4, "by its thread, for the eventfd may be full"
    assert os.eventfd_read(event) > 0
    os.close(event)
    vm.write_gpa(RAM, _SPIN)
    vm.kick(vcpu)
    assert name_of(vcpu.run) == "EINTR", "and the page can be mapped afterwards"
