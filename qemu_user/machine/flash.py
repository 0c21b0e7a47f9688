"""The banks of the flash as the guest sees them: memory that it reads and runs from, while they are in "read array".

Each bank's content is a memfd that kvmcore maps as a read-only memory slot; a store to it exits to devices/pflash.py, which
takes the slot away while loads are to be answered otherwise. Made by machine.py.
"""

from __future__ import annotations

import mmap
import os
from functools import partial
from typing import Any

from protocol.abi.structs import MEM_READONLY
from protocol.channel.shared_memory import create_memfd
from qemu_user.backends.block.raw import BlockBackend
from qemu_user.backends.errors import BackendError
from qemu_user.devices.pflash import BANK_SIZE, Bank
from qemu_user.machine import virt

FIRST_SLOT = 1
_SEGMENT = 1 << 42
"""Where the banks lie in the address space of our session with kvmcore."""


class FlashMemory:
    """`banks`, one for each file."""

    def __init__(self, vm: Any, files: list[BlockBackend]) -> None:
        """BackendError: a file that is no flash."""
        self._vm = vm
        self.banks: list[Bank] = []
        self._shown = [False] * len(files)
        for number, file in enumerate(files):
            if file.size != BANK_SIZE:
                raise BackendError(
                    f"flash (if=pflash,unit={number}): its file has {file.size} bytes; the bank has {BANK_SIZE} (32 MiB)"
                )
            fd = create_memfd(f"flash-{number}", BANK_SIZE)
            try:
                bank = Bank(memoryview(mmap.mmap(fd, BANK_SIZE)), file)
                bank.load()
                vm.map_segment(_SEGMENT + number * BANK_SIZE, BANK_SIZE, fd)
            finally:
                os.close(fd)
            bank.show = partial(self._show, number)
            self.banks.append(bank)
            bank.show(True)

    def _show(self, number: int, array: bool) -> None:
        if self._shown[number] == array:
            return
        self._shown[number] = array
        where = virt.PLACES["flash"].base + number * BANK_SIZE
        size = BANK_SIZE if array else 0
        self._vm.set_user_memory_region(FIRST_SLOT + number, where, size, _SEGMENT + number * BANK_SIZE, MEM_READONLY)
