"""The oracle's view of a KVM: handles with results as the recording wrote them ("0", "handle", "EINVAL").

Everything goes through a Backend, which speaks to a kvmcore; backend.py has the real one (client
and daemon). `Guest` is a VM with RAM, the guest program and vCPUs.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from protocol.abi import run_page, structs
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_NAME
from protocol.abi.structs_riscv import CORE_ID, one_reg_size

from . import guest

RAM, IMAGE = 0x10_0000_0000, 0x1_0000
"""Addresses of the client: writable memory, and a read-only mapping (as a program's text is)."""
ARGUMENT, POINTEE = 0x7000_0000, 0x7100_0000
RAM_SIZE = 0x100_0000
KICK_AFTER = 0.02
HUNG_AFTER = 5.0
"""Seconds after which a RUN that should have returned by itself is kicked, so that it shows as EINTR."""
U64 = (1 << 64) - 1


class Backend(Protocol):
    """How a kvmcore is reached. Handles are the backend's own objects."""

    def system(self) -> Any: ...

    def create_vm(self, kind: int) -> Any: ...

    def ioctl(self, handle: Any, request: int, argument: int, pointees: dict[int, bytearray]) -> int:
        """KvmError, or a result >= 0; pointees are changed in place."""

    def adopt(self, parent: Any, kind: str, number: int) -> Any:
        """The handle that an ioctl on `parent` returned, or wrote into a struct, as a number."""

    def number(self, handle: Any) -> int: ...

    def close(self, handle: Any) -> None: ...

    def close_vm(self, vm: Any) -> None:
        """End the VM and all its handles."""

    def duplicate(self, handle: Any) -> Any: ...

    def other_process(self, handle: Any, request: int, argument: int, pointees: dict[int, bytearray]) -> int:
        """The ioctl as a process that inherited the descriptor would issue it."""

    def read_file(self, handle: Any) -> bytes: ...

    def map(self, vm: Any, va: int, size: int, writable: bool) -> memoryview: ...

    def unmap(self, vm: Any, va: int, size: int) -> None: ...

    def pass_eventfd(self, vm: Any, fd: int) -> int:
        """The number under which structs may name our eventfd."""

    def page(self, vcpu: Any) -> memoryview:
        """The shared mapping: 8192 bytes."""

    def ring(self, vcpu: Any, size: int) -> memoryview:
        """The dirty ring, which has `size` bytes."""

    def unmap_page(self, vcpu: Any) -> None: ...

    def mmap(self, vcpu: Any, offset: int, size: int, private: bool, executable: bool) -> int:
        """mmap() of the vCPU; 0 or an errno."""

    def kick(self, vcpu: Any) -> None: ...


class EventFd:
    """One of our eventfds, and its number in a VM's session."""

    def __init__(self, fd: int, number: int) -> None:
        self.fd, self.number = fd, number

    def count(self) -> int:
        """Its counter, which is reset."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0


class Handle:
    """A descriptor of the recorded program."""

    def __init__(self, port: Port, inner: Any) -> None:
        self.port, self.inner, self.backend = port, inner, port.backend

    @property
    def number(self) -> int:
        return self.backend.number(self.inner)

    def call(
        self, request: str | int, argument: int | bytes | bytearray = 0, *pointees: tuple[int, bytearray]
    ) -> int:
        """The ioctl's value; KvmError. Bytes are passed by pointer; a bytearray shows what came back."""
        number = request if isinstance(request, int) else BY_NAME[request].number
        segments = dict(pointees)
        if not isinstance(argument, int):
            segments[ARGUMENT] = argument if isinstance(argument, bytearray) else bytearray(argument)
            argument = ARGUMENT
        return self.backend.ioctl(self.inner, number, argument & U64, segments)

    def result(
        self, request: str | int, argument: int | bytes | bytearray = 0, *pointees: tuple[int, bytearray]
    ) -> str:
        """The same as the recording wrote it."""
        try:
            return str(self.call(request, argument, *pointees))
        except KvmError as error:
            return error.name

    def from_another_process(self, request: str, argument: int | bytes = 0) -> str:
        segments = {} if isinstance(argument, int) else {ARGUMENT: bytearray(argument)}
        value = argument if isinstance(argument, int) else ARGUMENT
        try:
            return str(self.backend.other_process(self.inner, BY_NAME[request].number, value, segments))
        except KvmError as error:
            return error.name

    def stats(self) -> tuple[str, bytes]:
        """(result, contents) of GET_STATS_FD."""
        file = self.backend.adopt(self.inner, "stats", self.call("GET_STATS_FD"))
        return "handle", self.backend.read_file(file)

    def close_handle(self) -> None:
        self.backend.close(self.inner)


class Device(Handle):
    """The AIA device."""

    def _attribute(self, name: str, group: int, attr: int, value: bytearray | None) -> str:
        pointees = [] if value is None else [(POINTEE, value)]
        addr = 0 if value is None else POINTEE
        return self.result(name, structs.DEVICE_ATTR.build(group=group, attr=attr, addr=addr), *pointees)

    def get(self, group: int, attr: int, size: int) -> tuple[str, bytes]:
        value = bytearray(size)
        return self._attribute("GET_DEVICE_ATTR", group, attr, value), bytes(value)

    def set(self, group: int, attr: int, value: bytes = b"") -> str:
        return self._attribute("SET_DEVICE_ATTR", group, attr, bytearray(value) if value else None)

    def has(self, group: int, attr: int) -> str:
        return self._attribute("HAS_DEVICE_ATTR", group, attr, None)


class Vcpu(Handle):
    """A vCPU; registers are named by ONE_REG ids."""

    def get_bytes(self, register: int, size: int) -> bytes:
        value = bytearray(size)
        self.call("GET_ONE_REG", structs.ONE_REG.build(id=register, addr=POINTEE), (POINTEE, value))
        return bytes(value)

    def get(self, register: int) -> int:
        return int.from_bytes(self.get_bytes(register, one_reg_size(register)), "little")

    def get_result(self, register: int) -> str:
        return self.result(
            "GET_ONE_REG", structs.ONE_REG.build(id=register, addr=POINTEE), (POINTEE, bytearray(128))
        )

    def set_bytes(self, register: int, value: bytes) -> str:
        one_reg = structs.ONE_REG.build(id=register, addr=POINTEE)
        return self.result("SET_ONE_REG", one_reg, (POINTEE, bytearray(value)))

    def set(self, register: int, value: int) -> str:
        return self.set_bytes(register, (value & U64).to_bytes(8, "little")[: one_reg_size(register)])

    def x(self, name: str) -> int:
        return self.get(CORE_ID[name])

    def signed(self, name: str) -> int:
        value = self.x(name)
        return value - (1 << 64) if value >> 63 else value

    def set_x(self, name: str, value: int) -> str:
        return self.set(CORE_ID[name], value)

    def pc(self) -> int:
        return self.x("pc")

    def set_pc(self, label: str, offset: int = 0) -> str:
        return self.set(CORE_ID["pc"], guest.at(label) + offset)

    def mp_state(self) -> int:
        data = bytearray(4)
        self.call("GET_MP_STATE", data)
        return int.from_bytes(data, "little")

    def mp_state_result(self) -> str:
        return self.result("GET_MP_STATE", bytearray(4))

    def set_mp_state(self, state: int) -> str:
        return self.result("SET_MP_STATE", structs.MP_STATE.build(mp_state=state))

    def reg_list(self, room: int) -> tuple[str, Any]:
        """(result, n) when there is no room, else (result, ids)."""
        data = bytearray(struct.pack("<Q", room) + bytes(8 * room))
        result = self.result("GET_REG_LIST", data)
        (count,) = struct.unpack_from("<Q", data)
        return result, count if room < count else list(struct.unpack_from(f"<{count}Q", data, 8))

    def mmap(self, offset: int, size: int, private: bool = False, executable: bool = False) -> str:
        errno = self.backend.mmap(self.inner, offset, size, private, executable)
        return KvmError(errno).name if errno else "0"

    def duplicate(self) -> Vcpu:
        return Vcpu(self.port, self.backend.duplicate(self.inner))

    def unmap_page(self) -> None:
        self.backend.unmap_page(self.inner)


class Vm(Handle):
    """A VM, with the ioctls that take structs."""

    def __init__(self, port: Port, inner: Any) -> None:
        super().__init__(port, inner)
        self.vcpus: list[Vcpu] = []

    def close(self) -> None:
        self.backend.close_vm(self.inner)

    def map(self, va: int, size: int, writable: bool = True) -> memoryview:
        return self.backend.map(self.inner, va, size, writable)

    def unmap(self, va: int, size: int) -> None:
        self.backend.unmap(self.inner, va, size)

    def region(self, slot: int, flags: int, gpa: int, size: int, hva: int) -> str:
        layout = structs.USERSPACE_MEMORY_REGION
        members = {
            "slot": slot,
            "flags": flags,
            "guest_phys_addr": gpa,
            "memory_size": size,
            "userspace_addr": hva,
        }
        return self.result("SET_USER_MEMORY_REGION", layout.build(**members))

    def enable_cap(self, cap: int, value: int, flags: int = 0) -> str:
        return self.result(
            "ENABLE_CAP", structs.ENABLE_CAP.build(cap=cap, flags=flags, args=[value, 0, 0, 0])
        )

    def get_log(self, slot: int, bitmap: bytearray | None = None) -> str:
        argument = structs.DIRTY_LOG.build(slot=slot, dirty_bitmap=POINTEE)
        return self.result(
            "GET_DIRTY_LOG", argument, (POINTEE, bytearray(8192) if bitmap is None else bitmap)
        )

    def clear_log(self, slot: int, first: int, pages: int, bits: bytes = bytes(64)) -> str:
        argument = structs.CLEAR_DIRTY_LOG.build(
            slot=slot, first_page=first, num_pages=pages, dirty_bitmap=POINTEE
        )
        return self.result("CLEAR_DIRTY_LOG", argument, (POINTEE, bytearray(bits)))

    def result_handle(self, request: str, argument: int) -> str:
        """CREATE_VCPU: "handle" and a new entry in vcpus, or the errno."""
        try:
            number = self.call(request, argument)
        except KvmError as error:
            return error.name
        self.vcpus.append(Vcpu(self.port, self.backend.adopt(self.inner, "vcpu", number)))
        return "handle"

    def create_device(self, kind: int, flags: int = 0) -> tuple[str, Device | None]:
        data = bytearray(structs.CREATE_DEVICE.build(type=kind, flags=flags))
        result = self.result("CREATE_DEVICE", data)
        number = structs.CREATE_DEVICE.parse(data).fd
        if result != "0" or number == 0:
            return result, None
        return result, Device(self.port, self.backend.adopt(self.inner, "device", number))

    def eventfd(self) -> EventFd:
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return EventFd(fd, self.backend.pass_eventfd(self.inner, fd))

    def irqfd(self, event: EventFd | int, gsi: int, flags: int = 0, resample: EventFd | int = 0) -> str:
        fd, other = (_number(file) & 0xFFFFFFFF for file in (event, resample))
        return self.result("IRQFD", structs.IRQFD.build(fd=fd, gsi=gsi, flags=flags, resamplefd=other))

    def ioeventfd(
        self, event: EventFd | int, addr: int, length: int, match: int | None = None, flags: int = 0
    ) -> str:
        if match is not None:
            flags |= structs.IOEVENTFD_FLAG_DATAMATCH
        argument = structs.IOEVENTFD.build(
            fd=_number(event), addr=addr, len=length, datamatch=match or 0, flags=flags
        )
        return self.result("IOEVENTFD", argument)

    def msi(self, address: int, data: int, flags: int = 0) -> str:
        return self.result("SIGNAL_MSI", structs.MSI.build(address_lo=address, data=data, flags=flags))

    def routing(self, entries: list[bytes], flags: int = 0, number: int | None = None) -> str:
        head = structs.IRQ_ROUTING.build(nr=len(entries) if number is None else number, flags=flags)
        return self.result("SET_GSI_ROUTING", head + b"".join(entries))


def _number(file: EventFd | int) -> int:
    return file if isinstance(file, int) else file.number


class Port:
    """A fresh connection of the recorded program to one KVM."""

    kvm_run_size = run_page.KVM_RUN_SIZE

    def __init__(self, backend: Backend, compat: str) -> None:
        self.backend = backend
        self.compat = compat
        self.system = Handle(self, backend.system())

    def opened(self) -> str:
        return "handle"

    def core(self, name: str) -> int:
        return CORE_ID[name]

    def number_of(self, request: str) -> int:
        return BY_NAME[request].number

    def create_vm(self, kind: int = 0) -> Vm:
        return Vm(self, self.backend.create_vm(kind))

    def create_vm_result(self, kind: int) -> str:
        try:
            self.create_vm(kind).close()
        except KvmError as error:
            return error.name
        return "handle"

    def create_vms_until_failure(self, most: int = 4096) -> tuple[int, str]:
        vms: list[Vm] = []
        answer = "none"
        try:
            while len(vms) < most:
                vms.append(self.create_vm())
        except KvmError as error:
            answer = error.name
        for vm in vms:
            vm.close()
        return len(vms), answer


class Guest:
    """A VM with RAM at 0x80000000 (slot 0), the guest program in it, and vCPUs. run() runs `cpu`."""

    size = RAM_SIZE
    pages = RAM_SIZE // 4096

    def __init__(
        self, port: Port, cpus: int = 1, flags: int = 0, before: Callable[[Vm], object] = lambda vm: None
    ) -> None:
        self.port = port
        self.vm = port.create_vm()
        before(self.vm)
        self._flags = flags
        self.ram = self.vm.map(RAM, RAM_SIZE)
        self.ram[: len(guest.code())] = guest.code()
        self.vm.region(0, flags, guest.BASE, RAM_SIZE, RAM)
        for number in range(cpus):
            self.vm.result_handle("CREATE_VCPU", number)
        self.cpus = self.vm.vcpus
        if cpus:
            self.cpu = self.cpus[0]
            self.cpu.set_pc("start")

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.vm.close()

    @property
    def page(self) -> memoryview:
        return self.port.backend.page(self.cpu.inner)

    @property
    def immediate_exit(self) -> bool:
        return bool(self.page[run_page.IMMEDIATE_EXIT])

    @immediate_exit.setter
    def immediate_exit(self, on: bool) -> None:
        self.page[run_page.IMMEDIATE_EXIT] = on

    @property
    def exit_reason(self) -> int:
        return int(run_page.U32.unpack_from(self.page, run_page.EXIT_REASON)[0])

    def loop(self) -> str:
        """KVM_RUN of a guest that ends in a loop or a sleep, kicked; again until it is found in the same place.

        On a busy host the first kick may come before the guest has got there.
        """
        line, before = self.run(kick=KICK_AFTER), ""
        while line != before and "ret=EINTR exit=10" in line:
            line, before = self.run(kick=KICK_AFTER), line
        return line

    def run(self, kick: float | None = HUNG_AFTER) -> str:
        """KVM_RUN, kicked after `kick` seconds; the line that the recording wrote."""
        with self._kicked(kick):
            result = self.cpu.result("RUN")
        pc = (self.cpu.pc() - guest.BASE) & U64
        return f"ret={result} exit={self.exit_reason} pc=+{pc:#x}{self._details()}"

    @contextmanager
    def _kicked(self, after: float | None) -> Iterator[None]:
        if after is None:
            yield
            return
        timer = threading.Timer(after, lambda: self.port.backend.kick(self.cpu.inner))
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def _details(self) -> str:
        page, at = self.page, run_page.UNION
        if self.exit_reason == 6:
            gpa, data, length, is_write = run_page.MMIO.unpack_from(page, at)
            return f" mmio gpa={gpa:x} len={length} w={is_write} data={data.hex()}"
        if self.exit_reason == 35:
            eid, fid, *args, error, value = run_page.SBI.unpack_from(page, at)
            return f" sbi ext={eid:x} fid={fid:x} a0={args[0]:x} ret={error},{value}"
        if self.exit_reason == 36:
            number, new, mask, value = run_page.CSR.unpack_from(page, at)
            return f" csr={number:x} new={new:x} mask={mask:x} ret={value:x}"
        if self.exit_reason == 24:
            kind, count, data = run_page.SYSTEM_EVENT.unpack_from(page, at)
            return f" sysev type={kind} ndata={count} data0={data}"
        return ""

    def answer(self, data: bytes) -> None:
        """What a device answers to a load."""
        self.page[run_page.MMIO_DATA : run_page.MMIO_DATA + len(data)] = data

    def answer_sbi(self, error: int, value: int) -> None:
        struct.pack_into("<qq", self.page, run_page.SBI_RET, error, value)

    def finish(self) -> None:
        """Complete what is pending without running the guest."""
        self.immediate_exit = True
        self.cpu.result("RUN")
        self.immediate_exit = False

    def blank_union(self) -> None:
        self.page[run_page.UNION : run_page.UNION + run_page.UNION_SIZE] = bytes(run_page.UNION_SIZE)

    def log_words(self) -> tuple[int, ...]:
        """The first two words of slot 0's dirty log."""
        bitmap = bytearray(self.pages // 8)
        assert self.vm.get_log(0, bitmap) == "0"
        return struct.unpack_from("<2Q", bitmap)

    def reset_slot(self) -> None:
        """Slot 0 anew, so that its log starts as the VM's mode says."""
        assert self.vm.region(0, 0, guest.BASE, 0, RAM) == "0"
        assert self.vm.region(0, self._flags, guest.BASE, RAM_SIZE, RAM) == "0"

    def harvest(self, size: int) -> list[tuple[int, int, int]]:
        """Take every dirty entry of a ring of `size` bytes, as (flags, slot, offset); mark it as harvested."""
        ring, found = self.port.backend.ring(self.cpu.inner, size), []
        for at in range(0, len(ring), run_page.DIRTY_GFN_SIZE):
            entry = run_page.DIRTY_GFN.unpack_from(ring, at)
            if entry[0] != structs.DIRTY_GFN_DIRTY:
                break
            run_page.U32.pack_into(ring, at, structs.DIRTY_GFN_DIRTY | structs.DIRTY_GFN_RESET)
            found.append(entry)
        return found
