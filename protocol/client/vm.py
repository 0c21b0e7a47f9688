"""Vm: a VM's handle, and the memory files that it makes."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Sequence
from errno import EOPNOTSUPP

from protocol.abi import structs
from protocol.abi.errors import KvmError
from protocol.channel.shared_memory import create_memfd
from protocol.client.batch import NO_FD, Batch
from protocol.client.device import Device
from protocol.client.handle import POINTEE, Handle
from protocol.client.link import Channel, Link
from protocol.client.stats import Stats
from protocol.client.vcpu import Vcpu
from protocol.codec import control
from protocol.codec.session import Op


class GuestMemfd(Handle):
    """Guest memory owned by kvmcore. `fd` is its memfd here, ours until close(); -1 over tcp, where nothing is shared."""

    kind = "file"

    def __init__(self, link: Link, channel: Channel, number: int, size: int) -> None:
        super().__init__(link, channel, number)
        self.size = size
        fds = link.say(Op.SHARE, "mmap", number) if link.local else []
        self.fd = fds[0] if fds else -1

    def map(self) -> mmap.mmap:
        """The memory, shared and writable. KvmError(EOPNOTSUPP) over tcp: there read_gpa and write_gpa do."""
        if self.fd < 0:
            raise KvmError(EOPNOTSUPP, "mmap", "guest memory is not shared over tcp; use read_gpa and write_gpa")
        return mmap.mmap(self.fd, self.size)

    def close(self) -> None:
        if not self.closed and self.fd >= 0:
            os.close(self.fd)
        super().close()


class Vm(Handle):
    """A VM; `pid` is the process behind it. `owns_link`: nothing but this VM lives there."""

    kind = "vm"

    def __init__(
        self, link: Link, channel: Channel, number: int, pid: int, *, outlives: bool = False, owns_link: bool = True
    ) -> None:
        super().__init__(link, channel, number)
        self.pid = pid
        self.door = ""
        """Where a successor knocks (Kvm.attach_vm); "" over tcp."""
        self._outlives = outlives
        self._owns_link = owns_link
        self._stats: Stats | None = None

    @property
    def alive(self) -> bool:
        """Whether its process still runs."""
        return self.link.alive

    def check_extension(self, capability: int) -> int:
        """A capability's value for this VM."""
        return self.ioctl("CHECK_EXTENSION", capability)

    def enable_cap(self, capability: int, *args: int) -> None:
        """KVM_ENABLE_CAP."""
        self.call("ENABLE_CAP", cap=capability, args=[*args, 0, 0, 0, 0][:4])

    def statistics(self) -> dict[str, int | list[int]]:
        """KVM_GET_STATS_FD, read: the VM's counters now."""
        if self._stats is None:
            self._stats = Stats(self.link, self.channel, self.ioctl("GET_STATS_FD"))
        return self._stats.read()

    def batch(self) -> Batch:
        """Requests to this VM's handles that shall go in one message."""
        return Batch(self.channel, self.link)

    # -- memory ------------------------------------------------------------------------------------

    def create_guest_memfd(self, size: int, flags: int = 3) -> GuestMemfd:
        """Guest memory; flags 3: may be mapped, and is shared from the start."""
        number = self.call("CREATE_GUEST_MEMFD", size=size, flags=flags)
        return GuestMemfd(self.link, self.channel, number, size)

    def set_user_memory_region(
        self, slot: int, gpa: int, size: int, userspace_addr: int, flags: int = 0
    ) -> None:
        """A memslot over the session's address space."""
        self.call(
            "SET_USER_MEMORY_REGION",
            slot=slot,
            flags=flags,
            guest_phys_addr=gpa,
            memory_size=size,
            userspace_addr=userspace_addr,
        )

    def set_user_memory_region2(
        self,
        slot: int,
        gpa: int,
        size: int,
        userspace_addr: int = 0,
        flags: int = 0,
        guest_memfd: GuestMemfd | None = None,
        offset: int = 0,
        userfault_bitmap: int = 0,
    ) -> None:
        """The same, or over a guest_memfd (flag GUEST_MEMFD), or with pages that are yet to come (flag USERFAULT)."""
        self.call(
            "SET_USER_MEMORY_REGION2",
            slot=slot,
            flags=flags,
            guest_phys_addr=gpa,
            memory_size=size,
            userspace_addr=userspace_addr,
            guest_memfd=guest_memfd.number if guest_memfd is not None else 0,
            guest_memfd_offset=offset,
            userfault_bitmap=userfault_bitmap,
        )

    def get_dirty_log(self, slot: int, pages: int) -> bytes:
        """The dirty bitmap of a slot of `pages` pages."""
        bits = bytearray(-(-pages // 64) * 8)
        argument = structs.DIRTY_LOG.build(slot=slot, dirty_bitmap=POINTEE)
        self.ioctl("GET_DIRTY_LOG", argument, {POINTEE: bits})
        return bytes(bits)

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: bytes) -> None:
        """Watch the given pages again."""
        argument = structs.CLEAR_DIRTY_LOG.build(
            slot=slot, first_page=first_page, num_pages=num_pages, dirty_bitmap=POINTEE
        )
        self.ioctl("CLEAR_DIRTY_LOG", argument, {POINTEE: bitmap})

    def read_gpa(self, gpa: int, size: int) -> bytes:
        """Guest memory by message (for clients that do not map it)."""
        return self.control(control.READ_GPA, gpa, control.LENGTH.pack(size)).extra

    def write_gpa(self, gpa: int, data: bytes) -> None:
        """The same, into guest memory."""
        self.control(control.WRITE_GPA, gpa, data)

    def map_segment(self, va: int, size: int, fd: int, offset: int = 0, prot: int = 3) -> None:
        """Put a sealed memfd into the session's address space, where userspace_addr can point."""
        self.link.say(Op.MAP, "mmap", va, size, offset, prot, [fd])

    def unmap_segment(self, va: int, size: int) -> None:
        """Take it out again."""
        self.link.say(Op.UNMAP, "munmap", va, size)

    # -- a VM that outlives its client --------------------------------------------------------------

    def outlive(self, on: bool, condition: int = -1, words: Sequence[str] = ()) -> None:
        """Whether the VM goes on if this process dies without close(): vCPUs stop at their next exit, until another
        process attaches (Kvm.attach_vm). `condition`: a file; if it begins with one of the `words` when we die.
        """
        if condition < 0:
            self.link.say(Op.OUTLIVE, "outlive", int(on))
        else:
            self.link.say(Op.OUTLIVE, "outlive", int(on), fds=[condition], body={"while": list(words)})
        self._outlives = on

    def keep(self, key: int, fd: int) -> None:
        """Leave a descriptor for the process that attaches; -1: take it back."""
        self.link.say(Op.KEEP, "keep", key, fds=[fd] if fd >= 0 else None)

    def kept(self, key: int) -> int:
        """What was left under a key, ours to close; -1: nothing."""
        fds = self.link.say(Op.KEPT, "kept", key)
        return fds[0] if fds else -1

    # -- hot code ----------------------------------------------------------------------------------

    def hot_here(self) -> bytes:
        """What code is hot, for the kvmcore of another host (hot_elsewhere()); b"" if nothing is."""
        fds = self.link.say(Op.HOT, "hot", self.number)
        if not fds:
            return b""
        try:
            return os.pread(fds[0], os.fstat(fds[0]).st_size, 0)
        finally:
            os.close(fds[0])

    def hot_elsewhere(self, hot: bytes) -> None:
        """Tell the VM, before it runs, what was hot elsewhere: it is translated when there is time. KvmError."""
        fd = create_memfd("hot-code", len(hot))
        try:
            os.pwrite(fd, hot, 0)
            self.link.say(Op.HOT, "hot", self.number, fds=[fd])
        finally:
            os.close(fd)

    def prepare_hot(self) -> None:
        """After hot_elsewhere(), when the VM's memory is there: what can be done before it runs is done. KvmError."""
        self.link.say(Op.HOT, "hot", self.number, 1)

    # -- vCPUs and devices -------------------------------------------------------------------------

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """A vCPU, its page mapped."""
        number = self.ioctl("CREATE_VCPU", vcpu_id)
        return Vcpu(self.link, self.channel, number, vcpu_id)

    def kick(self, vcpu: Vcpu) -> None:
        """Make the vCPU's KVM_RUN return EINTR: the one that runs, or else the next one. Any thread."""
        if self.link.local:
            vcpu.doorbell.set_kick()
        self.channel.request(vcpu.number, control.KICK, int(not self.link.local), name="KICK")

    def create_device(self, type: int, flags: int = 0) -> Device:
        """An in-kernel device (11: AIA)."""
        made = self.call_out("CREATE_DEVICE", type=type, flags=flags)
        return Device(self.link, self.channel, made.fd)

    # -- interrupts and eventfds -------------------------------------------------------------------

    def _pass(self, fd: int) -> int:
        """Make our descriptor known to the server under its own number."""
        self.link.say(Op.PASS_FILE, "sendmsg", fd, fds=[fd])
        return fd

    def irqfd(self, eventfd: int, gsi: int, flags: int = 0, resamplefd: int = -1) -> None:
        """Signals of `eventfd` become interrupts."""
        other = self._pass(resamplefd) if resamplefd >= 0 else NO_FD
        self.call("IRQFD", fd=self._pass(eventfd), gsi=gsi, flags=flags, resamplefd=other)

    def ioeventfd(
        self, eventfd: int, addr: int, length: int, datamatch: int | None = None, flags: int = 0
    ) -> None:
        """Stores to an address signal `eventfd`, without an exit."""
        if datamatch is not None:
            flags |= structs.IOEVENTFD_FLAG_DATAMATCH
        self.call(
            "IOEVENTFD", datamatch=datamatch or 0, addr=addr, len=length, fd=self._pass(eventfd), flags=flags
        )

    def irq_line(self, gsi: int, level: int) -> None:
        """The level of a wired interrupt."""
        self.call("IRQ_LINE", irq=gsi, level=level)

    def signal_msi(self, address: int, data: int, devid: int | None = None) -> int:
        """Deliver an MSI."""
        return self.call(
            "SIGNAL_MSI",
            address_lo=address & 0xFFFFFFFF,
            address_hi=address >> 32,
            data=data,
            flags=structs.MSI_VALID_DEVID if devid is not None else 0,
            devid=devid or 0,
        )

    def set_gsi_routing(self, entries: Iterable[bytes]) -> None:
        """Replace the routing table; entries are kvm_irq_routing_entry."""
        table = list(entries)
        self.ioctl("SET_GSI_ROUTING", structs.IRQ_ROUTING.build(nr=len(table)) + b"".join(table))

    def register_coalesced_mmio(self, addr: int, size: int) -> None:
        """Stores into the zone go to the coalesced ring instead of exiting."""
        self.call("REGISTER_COALESCED_MMIO", addr=addr, size=size)

    def leave(self) -> None:
        """Hang up without destroying anything: a VM that outlives its client waits for another one."""
        self.closed = True
        self.link.close()

    def close(self) -> None:
        """Destroy the VM, and with it all its handles; with the last one of a process its session there ends."""
        if self._owns_link and not self.closed:
            if self._outlives:
                with contextlib.suppress(KvmError):
                    self.outlive(False)
            super().close()
            self.link.close()
        elif not self.closed:
            self.closed = True
            try:
                self.control(control.CLOSE_VM)
            except KvmError:
                pass  # gone already
