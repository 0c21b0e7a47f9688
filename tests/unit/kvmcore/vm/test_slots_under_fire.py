"""Memslots, dirty log and the client's mappings change at random while a vCPU stores into them: nothing breaks."""

from __future__ import annotations

import random
import threading

import pytest

from protocol.abi.errors import KvmError
from protocol.channel.shared_memory import Mapping
from tests.framework.asm import assemble

POINTEE = 0x7001_0000  # where conftest puts pointees
RAM, GPA, HVA, CODE = 0x10_0000_0000, 0x9000_0000, 0x20_0000_0000, 0x8000_0000
SOURCE = """
    li t0, 0x90000000
    li t1, 0x1000
1:  li t2, 16
    mv t3, t0
2:  sd t2, 0(t3)                # sixteen pages, over and over
    add t3, t3, t1
    addi t2, t2, -1
    bnez t2, 2b
    j 1b
"""


class Runner(threading.Thread):
    """Runs a vCPU until told to stop; MMIO exits and EFAULT are the guest's daily life here."""

    def __init__(self, cpu):
        super().__init__(daemon=True)
        self.cpu, self.stopping, self.unexpected = cpu, False, []

    def run(self):
        while not self.stopping:
            try:
                with self.cpu.mutex:
                    self.cpu.run()
            except KvmError as error:
                if error.name not in ("EFAULT", "EINTR"):
                    self.unexpected.append(error)
            except Exception as error:
                self.unexpected.append(error)
                return


@pytest.mark.parametrize("seed", range(4))
def test_random_changes(kernel, seed):
    choose = random.Random(seed)
    memfd = kernel.map(RAM, 0x10000)
    image = assemble(SOURCE, CODE).image
    Mapping([(memfd, 0, 0x10000)]).view[: len(image)] = image
    assert kernel.region(0, CODE, 0x10000, RAM) == 0
    cpu = kernel.session.lookup(kernel.call(kernel.vm, "CREATE_VCPU", 0))
    cpu.hart.state.pc = CODE
    gmem = kernel.ioctl(kernel.vm, "CREATE_GUEST_MEMFD", size=0x10000, flags=3)
    runner = Runner(cpu)
    runner.start()
    for _ in range(250):
        slot, action = choose.choice((1, 2, 3)), choose.random()
        if action < 0.55:
            kernel.region(
                slot, GPA + 0x1000 * choose.randrange(18), 0x1000 * choose.choice((0, 1, 4, 16)),
                HVA + 0x1000 * choose.randrange(4), choose.choice((0, 0, 1, 1, 2, 3, 4, 5)),
                guest_memfd=gmem, guest_memfd_offset=0x1000 * choose.randrange(4),
            )  # fmt: skip
        elif action < 0.7:
            kernel.errno(kernel.vm, "GET_DIRTY_LOG", bytes(8), slot=slot, dirty_bitmap=POINTEE)
        elif action < 0.8:
            pages = choose.choice((1, 4, 16, 64))
            kernel.errno(
                kernel.vm, "CLEAR_DIRTY_LOG", b"\xff" * 8, slot=slot, num_pages=pages, dirty_bitmap=POINTEE
            )
        elif action < 0.9:
            va, size = HVA + 0x1000 * choose.randrange(8), 0x1000 * choose.choice((1, 2, 5))
            if not kernel.session.mm.pieces(va, size):
                kernel.map(va, size)
        else:
            segments = kernel.session.mm.pieces(HVA, 0x100000)
            if segments:
                gone = choose.choice(segments)
                kernel.session.mm.unmap(gone.va, gone.size)
    runner.stopping = True
    cpu.kick()
    runner.join(60)
    assert not runner.is_alive()
    assert not runner.unexpected
