"""What a request asks for, done: ioctls through kvmcore.ioctl, and the control requests of the protocol.

Called by the router on the I/O thread. An ioctl of a vCPU is performed at once if the vCPU is idle, else on its thread
behind what is there already; KVM_RUN always goes there, KVM_INTERRUPT never does. Exactly one reply leaves for each
request. Must never wait on the I/O thread.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from errno import EAGAIN, EINVAL, EIO, EMFILE, ENFILE, ENOMEM, ENOSPC, ENOTTY
from functools import partial
from typing import TYPE_CHECKING, cast

from kvmcore import ioctl
from kvmcore.server.session import ClientSession
from kvmcore.vm.address_space import InlineSegment
from kvmcore.vm.irqchip.aia import Aia
from kvmcore.vm.objects import Deferred, Handle, HostFile
from protocol.abi import run_page
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_NAME
from protocol.codec import control, envelope
from protocol.codec.envelope import COPY_OUT, FrameError, Request

if TYPE_CHECKING:
    from kvmcore.vm.vcpu import Vcpu
    from kvmcore.vm.vm import Vm

log = logging.getLogger("kvmcore.requests")

_RUN = BY_NAME["RUN"].number
_INTERRUPT = BY_NAME["INTERRUPT"].number
_BRIEF = envelope.FLAG_BRIEF | envelope.FLAG_INLINE_PAGE
#: Bytes that READ and READ_GPA give at most.
_READ_LIMIT = 1 << 19
#: The head of kvm_run, all but the sync registers: what a client without shared memory sends and gets.
_PAGE_HEAD = run_page.SYNC_REGS

#: Sends the encoded reply of a ticket; any thread may call it.
Finish = Callable[["Ticket", bytes], None]


class Ticket:
    """A request that is being served, and the means to answer it, once, from any thread."""

    __slots__ = ("_finish", "identity", "request", "session")

    def __init__(self, finish: Finish, identity: bytes, session: ClientSession, request: Request) -> None:
        self.identity = identity
        self.session = session
        self.request = request
        self._finish = finish

    def fail(self, errno: int, extra: bytes = b"", copies: tuple[tuple[int, bytes], ...] = ()) -> None:
        """Failure. What had been copied out before stays copied out, as in Linux (GET_REG_LIST's E2BIG)."""
        self.answer(-1, extra, copies, errno)

    def answer(self, ret: int, extra: bytes = b"", copies: tuple[tuple[int, bytes], ...] = (), errno: int = 0) -> None:
        """Success, unless there is an errno: what ioctl(2) returns, and whatever goes with it."""
        seq = self.request.seq
        try:
            frame = envelope.reply_frame(seq, ret, errno, copies, extra)
        except FrameError as error:
            frame = envelope.reply_frame(seq, -1, EIO, extra=str(error).encode())
        self._finish(self, frame)


#: The ticket that the I/O thread performs on the system handle; CREATE_VM takes it to answer later.
current: list[Ticket] = []


def dispatch(ticket: Ticket) -> None:
    """Have `ticket` served."""
    request = ticket.request
    number = request.request
    try:
        if number >> 8 & 0xFF == control.CONTROL:
            _control(ticket)
            return
        handle = ticket.session.table.handle(request.handle)
    except KvmError as error:
        ticket.fail(error.errno or EINVAL, error.reason.encode())
        return
    if handle.kind != "vcpu" or number == _INTERRUPT:
        _perform(ticket, handle)
        return
    vcpu = cast("Vcpu", handle)
    if (number == _RUN and not _at_once(request, vcpu)) or not vcpu.try_now(_perform, ticket, vcpu):
        vcpu.submit(partial(_perform, ticket, vcpu))


def _at_once(request: Request, vcpu: Vcpu) -> bool:
    """Whether a RUN keeps nobody waiting: a brief one where nothing is attached that may block, or that does not enter."""
    if request.flags & _BRIEF != _BRIEF:
        return False
    immediate = request.payload[run_page.IMMEDIATE_EXIT : run_page.IMMEDIATE_EXIT + 1]
    return not vcpu.may_wait or (vcpu.private and immediate > b"\0")


def _perform(ticket: Ticket, handle: Handle) -> None:
    """An ioctl: on the I/O thread, or on the vCPU's with its mutex held."""
    request = ticket.request
    if request.request == _RUN and request.flags & envelope.FLAG_INLINE_PAGE and handle.kind == "vcpu":
        _run_inline(ticket, cast("Vcpu", handle))
        return
    mm = ticket.session.mm
    inline: list[InlineSegment] = []
    if request.copies:
        inline = [
            InlineSegment(va, data or bytes(length), direction & COPY_OUT != 0)
            for va, length, direction, data in request.copies
        ]
        mm.lay_over(inline)
    errno, reason = 0, ""
    result: int | Deferred = 0
    if handle.kind == "system":
        current.append(ticket)
    try:
        result = ioctl.call(handle, request.request, request.arg)
    except KvmError as error:
        errno, reason = error.errno or EIO, error.reason
    except Exception as error:
        errno, reason = _exhausted(error), f"this host has no more: {error}"
        if not errno:
            log.exception("internal error in %s", ioctl.name_of(handle.kind, request.request))
            errno, reason = EIO, "internal error, see kvmcore's log"
    finally:
        if handle.kind == "system":
            current.pop()
        if inline:
            mm.lay_over(())
    copies = tuple([(segment.va, bytes(segment.data)) for segment in inline if segment.dirty]) if inline else ()
    if errno:
        ticket.fail(errno, reason.encode()[:512], copies)
    elif not isinstance(result, Deferred):
        ticket.answer(result, b"", copies)


def _exhausted(error: Exception) -> int:
    """The errno, if memory, descriptors, threads or disk space of the host have run out; else 0."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "start new thread" in str(error)):
        return ENOMEM
    number = error.errno if isinstance(error, OSError) else None
    return number if number in (ENOMEM, EMFILE, ENFILE, ENOSPC, EAGAIN) else 0


def _run_inline(ticket: Ticket, vcpu: Vcpu) -> None:
    """KVM_RUN for a client that does not map the page: its head comes in the payload and goes back in the extra.

    The extra is the head as it came out, then the coalesced ring's page if there is something in it (it is drained).
    """
    request = ticket.request
    head = request.payload[:_PAGE_HEAD]
    vcpu.page[: len(head)] = head
    errno, ret = 0, 0
    try:
        vcpu.brief = bool(request.flags & envelope.FLAG_BRIEF)
        ret = cast(int, ioctl.call(vcpu, _RUN, request.arg))
    except KvmError as error:
        errno = error.errno or EIO
    except Exception:
        log.exception("internal error in RUN")
        errno = EIO
    finally:
        vcpu.brief = False
    extra = bytes(vcpu.page[:_PAGE_HEAD])
    ring = vcpu.vm.ring_view
    if ring is not None and ring[:4] != ring[4:8]:  # first and last
        extra += bytes(ring)
        ring[:4] = ring[4:8]
    if errno:
        ticket.fail(errno, extra)
    else:
        ticket.answer(ret, extra)


# -- control requests -----------------------------------------------------------------------------------------


def _control(ticket: Ticket) -> None:
    request, session = ticket.request, ticket.session
    match request.request:
        case control.CLOSE:
            session.table.close(request.handle)
            ticket.answer(0)
        case control.CLOSE_VM:
            ticket.answer(session.table.close_vm(request.handle))
        case control.DUP:
            ticket.answer(session.install(session.table.handle(request.handle)))
        case control.PING:
            session.seen()
            ticket.answer(0)
        case control.GOODBYE:
            ticket.answer(0)
            session.close()
        case control.MAP | control.UNMAP:
            _segment(session, request)
            ticket.answer(0)
        case control.KICK:
            _kick(session.table.handle(request.handle), request.arg)
            ticket.answer(0)
        case control.READ:
            handle = session.table.handle(request.handle)
            ticket.answer(0, handle.read(request.arg, _length(request)))
        case control.GET_STATE | control.SET_STATE:
            _state(ticket, session.table.handle(request.handle))
        case control.READ_GPA:
            memory = _vm(session.table.handle(request.handle)).memory
            ticket.answer(0, memory.read(request.arg, _length(request)))
        case control.WRITE_GPA:
            memory = _vm(session.table.handle(request.handle)).memory
            memory.write(request.arg, request.payload)
            ticket.answer(0)
        case _:
            raise KvmError(ENOTTY, reason="unknown control request")


def _state(ticket: Ticket, handle: Handle) -> None:
    """GET_STATE, SET_STATE: like the ioctls that they stand for, a vCPU's behind what runs there."""
    if handle.kind == "vcpu":
        vcpu = cast("Vcpu", handle)
        work = partial(_vcpu_state, ticket, vcpu)
        if not vcpu.try_now(work):
            vcpu.submit(work)
    elif isinstance(handle, Aia):
        _transfer(ticket, handle.read_register, handle.write_register)
    else:
        raise KvmError(EINVAL, reason="only vCPUs and devices have such state")


def _vcpu_state(ticket: Ticket, vcpu: Vcpu) -> None:
    registers = vcpu.registers

    def get(key: int) -> int:
        vcpu.vm.check_alive()
        return int.from_bytes(registers.get(key), "little")

    def put(key: int, value: int) -> None:
        vcpu.vm.check_alive()
        registers.set(key, value.to_bytes(8, "little")[: registers.size(key)])

    _transfer(ticket, get, put)


def _transfer(ticket: Ticket, get: Callable[[int], int], put: Callable[[int, int], None]) -> None:
    payload, writes = ticket.request.payload, ticket.request.request == control.SET_STATE
    if len(payload) % (16 if writes else 8) or len(payload) > (16 if writes else 8) * control.MAX_STATE:
        ticket.fail(EINVAL, b"keys, or keys and values, of 8 bytes each")
        return
    words, key = memoryview(payload).cast("Q"), 0
    values = array("Q")
    try:
        for position in range(0, len(words), 2 if writes else 1):
            key = words[position]
            if writes:
                put(key, words[position + 1])
            else:
                values.append(get(key))
    except KvmError as error:
        ticket.fail(error.errno or EIO, f"{key:#x}: {error.reason}".encode())
        return
    ticket.answer(0, values.tobytes())


def _segment(session: ClientSession, request: Request) -> None:
    """MAP, UNMAP."""
    if len(request.payload) != control.SEGMENT.size:
        raise KvmError(EINVAL, reason="the payload is a size, an offset and a protection")
    size, offset, prot = control.SEGMENT.unpack(request.payload)
    if request.request == control.UNMAP:
        session.unmap(request.arg, size)
        return
    file = session.table.lookup(request.handle)
    if not isinstance(file, HostFile):
        raise KvmError(EINVAL, reason="handles are shared by the session's socket, descriptors are mapped")
    session.map(request.arg, size, file, offset, prot)


def _kick(handle: Handle, arg: int) -> None:
    """KICK: the kick word of a client that maps the page is set already; for others (arg 1) it is set here."""
    if handle.kind != "vcpu":
        raise KvmError(EINVAL, reason="only vCPUs can be kicked")
    vcpu = cast("Vcpu", handle)
    if arg:
        vcpu.kick()
    else:
        vcpu.poke()


def _vm(handle: Handle) -> Vm:
    if handle.kind != "vm":
        raise KvmError(EINVAL, reason="guest memory is read through the VM's handle")
    vm = cast("Vm", handle)
    vm.check_alive()
    return vm


def _length(request: Request) -> int:
    if len(request.payload) != control.LENGTH.size:
        raise KvmError(EINVAL, reason="the payload is a u32 length")
    length: int = control.LENGTH.unpack(request.payload)[0]
    if length > _READ_LIMIT:
        raise KvmError(EINVAL, reason=f"at most {_READ_LIMIT} bytes at a time")
    return length
