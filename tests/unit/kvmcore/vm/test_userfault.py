"""Pages that are yet to come (KVM_MEM_USERFAULT): every kind of access leaves with KVM_EXIT_MEMORY_FAULT, nothing done,
and does its work when the page is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from errno import EFAULT, EINVAL

import pytest

from protocol.abi import run_page, structs
from protocol.abi import structs_riscv as riscv
from protocol.abi.errors import KvmError
from protocol.abi.exits import Exit
from protocol.channel.shared_memory import Mapping, create_memfd
from protocol.client import Kvm
from tests.framework.asm import assemble
from tests.framework.full_stack import Daemon

GPA, SIZE, PAGE = 0x8000_0000, 16 << 20, 4096
BITMAP = 0x20_0000_0000
FLAGS = structs.MEM_GUEST_MEMFD | structs.MEM_USERFAULT
DONE = "li t6, 0x10000000; sw a0, 0(t6)"


@pytest.fixture(scope="module", params=["translator", "reference"])
def endpoint(request: pytest.FixtureRequest) -> Iterator[str]:
    with Daemon("--accel", request.param) as daemon:
        yield daemon.endpoint


class Guest:
    """One vCPU; `absent` pages come when fetch() says so."""

    def __init__(self, endpoint: str, source: str, absent: set[int]) -> None:
        self.kvm = Kvm.open(endpoint)
        self.vm = self.kvm.create_vm()
        self.memfd = self.vm.create_guest_memfd(SIZE)
        self.ram = self.memfd.map()
        bits = create_memfd("bitmap", PAGE)
        self.bits = Mapping([(bits, 0, PAGE)])
        self.vm.map_segment(BITMAP, PAGE, bits)
        program = assemble(source, GPA).image
        self.ram[: len(program)] = program
        self.content = {page: bytes(self.ram[page * PAGE : (page + 1) * PAGE]) for page in absent}
        for page in absent:
            self.ram[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
            self.bits.view[page // 8] |= 1 << page % 8
        self.vm.set_user_memory_region2(0, GPA, SIZE, 0, FLAGS, self.memfd, 0, BITMAP)
        self.vcpu = self.vm.create_vcpu(0)
        self.vcpu.set_one_reg(riscv.PC, GPA)
        self.faults: list[int] = []

    def run(self) -> int:
        """To the store that says that it is done; its value."""
        while True:
            try:
                reason = self.vcpu.run()
            except KvmError as error:
                if error.errno != EFAULT:
                    raise
                assert run_page.U32.unpack_from(self.vcpu.run_page, run_page.EXIT_REASON)[0] == Exit.MEMORY_FAULT
                flags, gpa, size = run_page.MEMORY_FAULT.unpack_from(self.vcpu.run_page, run_page.UNION)
                assert (flags, size) == (structs.MEMORY_EXIT_FLAG_USERFAULT, PAGE)
                self.faults.append((gpa - GPA) // PAGE)
                assert len(self.faults) < 50
                self.fetch(self.faults[-1])
                continue
            assert reason == Exit.MMIO
            data = run_page.MMIO.unpack_from(self.vcpu.run_page, run_page.UNION)[1]
            self.vm.close()
            self.kvm.close()
            return int.from_bytes(data[:4], "little")

    def fetch(self, page: int) -> None:
        self.ram[page * PAGE : (page + 1) * PAGE] = self.content[page]
        self.bits.view[page // 8] &= ~(1 << page % 8)


CASES = {
    "load": ("li t0, 0x80003000; lw a0, 0(t0)", {3, 9}, [3]),
    "store": ("li t0, 0x80003008; li t1, 7; sd t1, 0(t0); lw a0, 0(t0)", {3}, [3]),
    "atomic": ("li t0, 0x80003000; li t1, 5; amoadd.w a0, t1, (t0); lw a0, 0(t0)", {3}, [3]),
    "two pages": ("li t0, 0x80002ffe; li t1, 0x11223344; sw t1, 0(t0); lw a0, 0(t0)", {2, 3}, [2, 3]),
    "fetch": ("li t0, 0x80004000; jr t0; .balign 4096; .zero 12288; li a0, 42", {4}, [4]),
    "own code": ("li a0, 3", {0}, [0]),
}


@pytest.mark.parametrize("name", CASES)
def test_access(name: str, endpoint: str) -> None:
    source, absent, faults = CASES[name]
    wanted = Guest(endpoint, f"{source}; {DONE}", set()).run()
    guest = Guest(endpoint, f"{source}; {DONE}", absent)
    assert guest.run() == wanted
    assert guest.faults == faults


def test_page_tables_come_as_they_are_walked(endpoint: str) -> None:
    """Sv39: gigapage table at page 16, a megapage table at 17, a page table at 18 that maps va 0x200000 to page 5."""
    guest = Guest(endpoint, f"csrw satp, a1; sfence.vma; li t0, 0x80000000; lw a0, 8(a2); {DONE}", set())

    def pointer(page: int, flags: int) -> bytes:
        return ((GPA >> 12) + page << 10 | flags).to_bytes(8, "little")

    identity, leaf = 0xCF, 0xC7
    guest.ram[16 * PAGE + 16 : 16 * PAGE + 24] = ((GPA >> 12) << 10 | identity).to_bytes(8, "little")
    guest.ram[16 * PAGE : 16 * PAGE + 8] = pointer(17, 1)
    guest.ram[17 * PAGE + 8 : 17 * PAGE + 16] = pointer(18, 1)
    guest.ram[18 * PAGE : 18 * PAGE + 8] = pointer(5, leaf)
    guest.ram[5 * PAGE + 8 : 5 * PAGE + 12] = (77).to_bytes(4, "little")
    # The device is reached through the gigapage at 0 of another entry: identity for the first gigabyte is not needed.
    guest.ram[16 * PAGE + 24 : 16 * PAGE + 32] = ((0) << 10 | identity).to_bytes(8, "little")
    code = assemble("csrw satp, a1; sfence.vma; lw a0, 8(a2); li t6, 0xd0000000; sw a0, 0(t6)", GPA).image
    guest.ram[: len(code)] = code
    for page in (5, 16, 17, 18):
        guest.content[page] = bytes(guest.ram[page * PAGE : (page + 1) * PAGE])
        guest.ram[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
        guest.bits.view[page // 8] |= 1 << page % 8
    guest.vcpu.set_one_reg(riscv.A1, 8 << 60 | (GPA >> 12) + 16)
    guest.vcpu.set_one_reg(riscv.CORE_ID["a2"], 0x20_0000)
    assert guest.run() == 77
    assert guest.faults == [16, 17, 18, 5]


def test_bitmaps_are_checked(endpoint: str) -> None:
    kvm = Kvm.open(endpoint)
    vm = kvm.create_vm()
    memfd = vm.create_guest_memfd(SIZE)
    for address, errno in ((BITMAP, EFAULT), (BITMAP + 4, EINVAL)):
        with pytest.raises(KvmError) as refused:
            vm.set_user_memory_region2(0, GPA, SIZE, 0, FLAGS, memfd, 0, address)
        assert refused.value.errno == errno
    bits = create_memfd("bitmap", PAGE)
    vm.map_segment(BITMAP, PAGE, bits)
    vm.set_user_memory_region2(0, GPA, SIZE, 0, FLAGS, memfd, 0, BITMAP)
    both = FLAGS | structs.MEM_LOG_DIRTY_PAGES
    vm.set_user_memory_region2(0, GPA, SIZE, 0, both, memfd, 0, BITMAP)
    vm.set_user_memory_region2(0, GPA, SIZE, 0, structs.MEM_GUEST_MEMFD, memfd, 0)
    with pytest.raises(KvmError) as refused:
        vm.set_user_memory_region2(0, GPA, SIZE, 0, structs.MEM_GUEST_MEMFD, memfd, 0)
    assert refused.value.errno == EINVAL
    vm.close()
    kvm.close()
