"""A VM that nobody sees: made, told what VMs are told when they start or arrive, and thrown away, by the library that clients
use and the functions that serve them.

The zygote does it when nobody waits, so that its children find code that has run already: CPython adapts code where it lies
when it has run some times, and a child that is the first to run it gets a copy of each page of it. Leaves no thread and no
descriptor behind. Must never meet a client.
"""

from __future__ import annotations

import itertools
import os
from array import array
from typing import cast

from kvmcore.server.loop import EventLoop
from kvmcore.server.quotas import Quotas
from kvmcore.server.requests import Ticket, dispatch
from kvmcore.server.session import ClientSession, Peer
from kvmcore.vm.accelerator import INTERPRETER
from kvmcore.vm.vm import Vm as ServedVm
from protocol.abi import structs
from protocol.abi import structs_riscv as riscv
from protocol.abi.errors import KvmError
from protocol.channel import process_memory
from protocol.channel.shared_memory import PAGE, create_memfd
from protocol.client.device import Device
from protocol.client.link import Channel, Link
from protocol.client.vm import Vm
from protocol.codec import envelope
from protocol.codec import session as session_codec
from protocol.codec.envelope import Copy, Reply, Request
from protocol.codec.session import Message, Op

WARM = 10
"""How often code runs until CPython has adapted it."""
_MEMORY = 1 << 20
_RAM, _APLIC, _IMSIC, _BITMAP = 0x8000_0000, 0xD00_0000, 0x2800_0000, 1 << 40
_SOURCES, _IDENTITIES = 96, 255
_LINES = 4


class _Served:
    """Link and Channel of a client whose server is this very process: each request is encoded, decoded and served as if it had
    come by a socket."""

    local = True
    closed = False
    session = bytes(16)
    incarnation = 1

    def __init__(self, session: ClientSession) -> None:
        self._session = session
        self._sequence = itertools.count(1)
        self._frames: list[bytes] = []

    @property
    def alive(self) -> bool:
        return True

    def check_owner(self, name: str) -> None:
        pass

    def request(
        self, handle: int, number: int, arg: int = 0, *, name: str = "", copies: tuple[Copy, ...] = (),
        payload: bytes = b"", flags: int = 0,
    ) -> Reply:  # fmt: skip
        request = Request(1, self.session, next(self._sequence), handle, number, arg, flags, copies, payload)
        came = envelope.decode_request(envelope.encode_request(request))
        dispatch(Ticket(lambda ticket, frame: self._frames.append(frame), b"", self._session, came))
        reply = envelope.decode_reply(self._frames.pop())
        if reply.errno:
            raise KvmError(reply.errno, name, reply.extra.decode(errors="replace"))
        return reply

    def request_all(self, requests: list[tuple[int, int, int, tuple[Copy, ...], bytes]]) -> list[Reply]:
        return [
            self.request(handle, number, arg, copies=copies, payload=payload)
            for handle, number, arg, copies, payload in requests
        ]

    def say(
        self, op: Op, name: str, a: int = 0, b: int = 0, c: int = 0, d: int = 0, fds: list[int] | None = None
    ) -> list[int]:
        taken = [os.dup(fd) for fd in fds or ()]
        came = session_codec.decode(session_codec.encode(Message(op, 1, 0, a, b, c, d)))
        answer, shared = self._session.serve(came, taken)
        for fd in taken:
            os.close(fd)
        if answer.errno:
            raise KvmError(answer.errno, name)
        return [os.dup(fd) for fd in shared]

    def close(self) -> None:
        pass

    def pass_files(self, fds: list[int]) -> None:
        for fd in fds:
            self.say(Op.PASS_FILE, "sendmsg", fd, fds=[fd])


def rehearse(times: int = WARM) -> None:
    """So often."""
    loop = EventLoop()
    try:
        for number in range(times):
            if number == times - 1:
                process_memory.forget_lookups()
            session = ClientSession(bytes(16), Peer(os.getpid(), os.getuid()), Quotas.of_this_process(), name="rehearsal")
            served = ServedVm(session, loop, name="rehearsal", accel=INTERPRETER)
            try:
                _start(_Served(session), session.install(served))
            finally:
                session.close()
                served.release()
    finally:
        loop.close()


def _start(served: _Served, number: int) -> None:
    """As a VM arrives: vCPU, memory that is yet to come, interrupt controller, wires and doorbells, its registers."""
    vm = Vm(cast(Link, served), cast(Channel, served), number, os.getpid())
    aia = vm.create_device(structs.DEV_TYPE_RISCV_AIA)
    memory = vm.create_guest_memfd(_MEMORY)
    cpu = vm.ioctl("CREATE_VCPU", 0)
    bitmap = create_memfd("userfault-bitmap", PAGE)
    fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2 * _LINES)]
    try:
        vcpu = Device(vm.link, vm.channel, cpu)  # only its number counts: the page of a real one starts a thread
        vm.set_user_memory_region2(0, _RAM, _MEMORY, 0, structs.MEM_GUEST_MEMFD, memory, 0)
        _configure(vm, aia)
        batch = vm.batch()
        answers = [batch.irqfd(vm, fd, 1 + line) for line, fd in enumerate(fds[:_LINES])]
        batch.send()
        vm.map_segment(_BITMAP, PAGE, bitmap)
        flags = structs.MEM_GUEST_MEMFD | structs.MEM_USERFAULT
        vm.set_user_memory_region2(0, _RAM, _MEMORY, 0, flags, memory, 0, _BITMAP)
        listed = _registers(vcpu)
        batch = vm.batch()
        values = batch.get_state(vcpu, listed)
        batch.get_mp_state(vcpu)
        batch.send()
        batch = vm.batch()
        pairs = zip(listed, values.words(), strict=True)
        answers.append(batch.set_state(vcpu, [word for pair in pairs if pair != (riscv.TIMER_ID["state"], 0) for word in pair]))
        answers.append(batch.set_mp_state(vcpu, structs.MP_STATE_RUNNABLE))
        batch.send()
        batch = vm.batch()
        answers += [batch.ioeventfd(vm, fd, 0x4000_0000 + 4 * line, 4, None) for line, fd in enumerate(fds[_LINES:])]
        batch.send()
        keys = Device.keys([(riscv.AiaGroup.APLIC, 4 * register) for register in range(1, _SOURCES)])
        batch = vm.batch()
        state = batch.get_state(aia, keys)
        batch.send()
        batch = vm.batch()
        answers.append(batch.set_state(aia, [word for pair in zip(keys, state.words(), strict=True) for word in pair]))
        answers.append(batch.set_state(vcpu, [riscv.TIMER_ID["time"], 0]))
        batch.send()
        for answer in answers:
            answer.checked()
    finally:
        memory.close()
        vm.close()
        for fd in [*fds, bitmap]:
            os.close(fd)


def _configure(vm: Vm, aia: Device) -> None:
    config, address = riscv.AiaGroup.CONFIG, riscv.AiaGroup.ADDR
    values = [
        (config, riscv.AiaConfig.SRCS, _SOURCES.to_bytes(4, "little")),
        (config, riscv.AiaConfig.IDS, _IDENTITIES.to_bytes(4, "little")),
        (config, riscv.AiaConfig.HART_BITS, bytes(4)),
        (address, riscv.AIA_ADDR_APLIC, _APLIC.to_bytes(8, "little")),
        (address, riscv.aia_addr_imsic(0), _IMSIC.to_bytes(8, "little")),
    ]
    batch = vm.batch()
    for value in values:
        batch.set_attr(aia, *value)
    answer = batch.set_attr(aia, riscv.AiaGroup.CTRL, riscv.AIA_CTRL_INIT, None)
    batch.send()
    answer.checked()


def _registers(vcpu: Device) -> list[int]:
    """KVM_GET_REG_LIST, without the time, which is the VM's."""
    room = 512
    data = bytearray(structs.REG_LIST.build(n=room) + bytes(8 * room))
    vcpu.ioctl("GET_REG_LIST", data)
    count = int.from_bytes(data[:8], "little")
    return [register for register in array("Q", bytes(data[8 : 8 + 8 * count])) if register != riscv.TIMER_ID["time"]]
