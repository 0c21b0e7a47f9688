"""Vcpu: a vCPU's handle, its shared page, and KVM_RUN by the doorbell."""

from __future__ import annotations

import ctypes
import os
from errno import ECONNRESET, EINVAL, EPERM

from protocol.abi import run_page, structs
from protocol.abi.capabilities import DIRTY_RING_PAGE
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_NAME
from protocol.abi.structs_riscv import one_reg_size
from protocol.channel.doorbell import Doorbell
from protocol.channel.shared_memory import PROT_EXEC, Mapping, create_memfd
from protocol.channel.vdso import GAVE_UP
from protocol.client.handle import ARGUMENT, POINTEE, Handle
from protocol.client.link import Channel, Link
from protocol.codec.envelope import COPY_IN, FLAG_INLINE_PAGE, Copy
from protocol.codec.session import Op


class Vcpu(Handle):
    """A vCPU. run() is for one thread; the other calls are queued behind it by the server."""

    kind = "vcpu"

    def __init__(self, link: Link, control: Channel, number: int, vcpu_id: int) -> None:
        # Requests that wait behind a RUN must not hold up kicks: a channel of its own, made when first used.
        super().__init__(link, link.channel(), number)
        self.id = vcpu_id
        self._control = control
        if link.local:
            fds = link.say(Op.SHARE, "mmap", number)
        else:
            fds = [create_memfd("kvm-run", run_page.PAGE), create_memfd("kvm-ring", run_page.PAGE)]
        try:
            self._mapping = Mapping([(fd, 0, run_page.PAGE) for fd in fds[:2]])
        finally:
            for fd in fds:
                os.close(fd)
        self.run_page = self._mapping.view
        """kvm_run with the doorbell words, then the VM's coalesced ring; 8192 bytes."""
        self.doorbell = Doorbell(self.run_page, self._mapping.address, run_page.DOORBELL_BELL)
        self._vdso = link.vdso() if link.local else None
        if self._vdso is not None:
            self._enter, self._spin = self._vdso.run, self._vdso.state(self._mapping.address + run_page.DOORBELL_BELL)
            self._state = ctypes.addressof(self._spin)

    def close(self) -> None:
        """close(2). The mapping stays as long as somebody looks at it."""
        super().close()
        self.link.drop(self.channel)

    def mmap(self, offset: int, size: int, prot: int = 3, *, private: bool = False) -> Mapping:
        """mmap(2) of the vCPU, bytes of whole pages: page 0 kvm_run, 1 the coalesced ring, from 64 on the dirty ring.

        What lies between is SIGBUS when it is touched. The dirty ring may not be private (EINVAL) or executable
        (EPERM). Linux's rules (KVM_ABI 1.3).
        """
        first, end = offset // run_page.PAGE, (offset + size) // run_page.PAGE
        fds = self.link.say(Op.SHARE, "mmap", self.number)
        fds.append(create_memfd("kvm-nothing", 0))
        try:
            ring_pages = os.fstat(fds[2]).st_size // run_page.PAGE
            ring = range(DIRTY_RING_PAGE, DIRTY_RING_PAGE + ring_pages)
            if first in ring or end - 1 in ring:
                if private:
                    raise KvmError(EINVAL, "mmap", "a dirty ring is shared")
                if prot & PROT_EXEC:
                    raise KvmError(EPERM, "mmap", "a dirty ring is not executable")
            pieces: list[tuple[int, int, int]] = []
            for page in range(first, end):
                where = (fds[page], 0) if page < 2 else (fds[2], page - ring.start) if page in ring else (fds[-1], 0)
                pieces.append((where[0], where[1] * run_page.PAGE, run_page.PAGE))
            return Mapping(pieces, prot, private=private)
        finally:
            for fd in fds:
                os.close(fd)

    def run(self) -> int:
        """KVM_RUN: enter the guest; returns exit_reason. KvmError: EINTR (kicked), EIO, EFAULT, EOPNOTSUPP,
        or ECONNRESET when the VM's process is gone.
        """
        link = self.link
        link.check_owner("RUN")
        if self._vdso is None:
            return self._finish(self.doorbell.request()) if link.local else self._run_by_message()
        result: int = self._enter(self._state)
        while result == GAVE_UP:
            self._look("RUN")
            result = self._enter(self._state)
        if result < 0:
            raise KvmError(-result, "RUN")
        return result

    def rejoin(self) -> int:
        """The RUN that a client before us asked for: waits for it, and answers as run() would have. Its first one if it
        asked for none."""
        sequence = self.doorbell.requested()
        return self._finish(sequence) if sequence else self.run()

    def _look(self, name: str) -> None:
        if not self.link.alive:
            raise KvmError(ECONNRESET, name, "the VM's kvmcore process is gone")

    def _finish(self, sequence: int) -> int:
        """Wait for a RUN without kvmcore's code: system calls, and no spin."""
        doorbell = self.doorbell
        while (answer := doorbell.wait_reply(sequence)) is None:
            self._look("RUN")
        ret, errno = answer
        if ret:
            raise KvmError(errno, "RUN")
        reason: int = run_page.U32.unpack_from(self.run_page, run_page.EXIT_REASON)[0]
        return reason

    def _run_by_message(self) -> int:
        """KVM_RUN without shared memory: the page's head goes along and comes back, the coalesced ring if it has entries."""
        head = bytes(self.run_page[: run_page.SYNC_REGS])
        number = BY_NAME["RUN"].number
        try:
            reply = self.channel.request(self.number, number, 0, name="RUN", payload=head, flags=FLAG_INLINE_PAGE)
        except KvmError as error:
            self._take_page(getattr(error, "extra", b""))
            raise
        self._take_page(reply.extra)
        reason: int = run_page.U32.unpack_from(self.run_page, run_page.EXIT_REASON)[0]
        return reason

    def _take_page(self, extra: bytes) -> None:
        head, ring = extra[: run_page.SYNC_REGS], extra[run_page.SYNC_REGS :]
        self.run_page[: len(head)] = head
        if ring:
            at = run_page.COALESCED_RING
            self.run_page[at : at + len(ring)] = ring

    def get_one_reg(self, register: int) -> int:
        """A register's value (sizes up to 8 bytes as a number)."""
        value = bytearray(one_reg_size(register))
        self.ioctl("GET_ONE_REG", structs.ONE_REG.build(id=register, addr=POINTEE), {POINTEE: value})
        return int.from_bytes(value, "little")

    def set_one_reg(self, register: int, value: int) -> None:
        """Write a register."""
        data = (value & (1 << 8 * one_reg_size(register)) - 1).to_bytes(one_reg_size(register), "little")
        self.ioctl("SET_ONE_REG", structs.ONE_REG.build(id=register, addr=POINTEE), {POINTEE: data})

    def get_reg_list(self) -> list[int]:
        """The ids of all registers."""
        room = 256
        while True:
            data = bytearray(structs.REG_LIST.build(n=room) + bytes(8 * room))
            try:
                self.ioctl("GET_REG_LIST", data)
            except KvmError as error:
                needed = int.from_bytes(data[:8], "little")
                if error.name != "E2BIG" or needed <= room:
                    raise
                room = needed
                continue
            count = int.from_bytes(data[:8], "little")
            return [int.from_bytes(data[8 + 8 * i : 16 + 8 * i], "little") for i in range(count)]

    def get_mp_state(self) -> int:
        """0 RUNNABLE, 5 STOPPED."""
        data = bytearray(structs.MP_STATE.size)
        self.ioctl("GET_MP_STATE", data)
        return int.from_bytes(data, "little")

    def set_mp_state(self, state: int) -> None:
        """Start or stop it."""
        self.call("SET_MP_STATE", mp_state=state)

    def interrupt(self, level: bool) -> None:
        """The external interrupt's line (VMs whose controller is in user space). Any thread, at any time."""
        irq = structs.INTERRUPT_SET if level else structs.INTERRUPT_UNSET
        argument = structs.INTERRUPT.build(irq=irq)
        copy = Copy(ARGUMENT, len(argument), COPY_IN, argument)
        number = BY_NAME["INTERRUPT"].number
        self._control.request(self.number, number, ARGUMENT, name="INTERRUPT", copies=(copy,))
