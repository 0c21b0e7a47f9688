"""The banks of the flash as the guest sees them: memory that it reads and runs from, while they are in "read array".

Each bank's content is a memfd that kvmcore maps as a read-only memory slot; a store to it exits to devices/pflash.py, which
takes the slot away while loads are to be answered otherwise. Made by machine.py. Content is what a migration or a snapshot
copies, as if it were a disk's (migration/volumes.py); the file has the same, but for a bank that just comes from elsewhere.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from protocol.abi.errors import KvmError
from protocol.abi.structs import MEM_READONLY
from protocol.channel.shared_memory import create_memfd
from qemu_user.backends.block.logged import BLOCK
from qemu_user.backends.block.raw import BlockBackend
from qemu_user.backends.errors import BackendError
from qemu_user.devices.pflash import BANK_SIZE, Bank
from qemu_user.machine import virt
from qemu_user.write_log import WriteLog

FIRST_SLOT = 1
_SEGMENT = 1 << 42
"""Where the banks lie in the address space of our session with kvmcore."""


class BankContent:
    """What a bank holds, to be copied as a disk is (volumes.Copied)."""

    size = BANK_SIZE

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self.log = WriteLog(BANK_SIZE, BLOCK)
        self.through = False
        """Whether what is written here goes to the bank's file, too: it is a new one, empty so far."""
        bank.changed = self.log.wrote

    @property
    def descriptor(self) -> int | None:
        """No file is the content."""
        return None

    def lock(self) -> None:
        """The bank's file. BackendError if others have it."""
        if self._bank.file is not None:
            self._bank.file.lock()

    def with_data(self, unit: int, chain: bool = True) -> bytearray:
        """A byte per `unit` bytes: 0 where all is zero."""
        content, zeroes = self._bank.content, bytes(unit)
        return bytearray(bytes(content[at : at + unit]) != zeroes for at in range(0, BANK_SIZE, unit))

    def read(self, offset: int, views: list[memoryview]) -> None:
        """Fill `views` from `offset` on."""
        for view in views:
            view[:] = self._bank.content[offset : offset + len(view)]
            offset += len(view)

    def write(self, offset: int, views: list[memoryview]) -> None:
        """Put `views` at `offset`. OSError of the file."""
        if self.through and self._bank.file is not None:
            self._bank.file.write(offset, views)
        for view in views:
            self._bank.content[offset : offset + len(view)] = view
            offset += len(view)

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        """The range is zero."""
        self.write(offset, [memoryview(bytes(length))])

    def flush(self) -> None:
        """What was written through is on the disk."""
        if self.through and self._bank.file is not None:
            self._bank.file.flush()


class FlashMemory:
    """`banks`, one for each file, `contents` of the same, and `fds`, the memfds that they lie in, ours until close()."""

    def __init__(self, vm: Any, files: list[BlockBackend], arriving: bool, kept: Callable[[int], int] | None = None) -> None:
        """`arriving`: content comes from elsewhere, the banks are zero so far. `kept`: gives the memfd of a bank of a VM that
        has lost its device process. BackendError: a file that is no flash."""
        self._vm = vm
        self.banks: list[Bank] = []
        self.fds: list[int] = []
        self._shown: list[bool | None] = [False if kept is None else None] * len(files)
        """None: not known."""
        try:
            for number, file in enumerate(files):
                if file.size != BANK_SIZE:
                    raise BackendError(
                        f"flash (if=pflash,unit={number}): its file has {file.size} bytes; the bank has {BANK_SIZE} (32 MiB)"
                    )
                self.fds.append(create_memfd(f"flash-{number}", BANK_SIZE) if kept is None else kept(number))
                bank = Bank(memoryview(mmap.mmap(self.fds[-1], BANK_SIZE)), file)
                bank.show = partial(self._show, number)
                self.banks.append(bank)
                if kept is None:
                    vm.map_segment(_SEGMENT + number * BANK_SIZE, BANK_SIZE, self.fds[-1])
                    if not arriving:
                        bank.load()
                    bank.show(True)
        except BaseException:
            self.close()
            raise
        self.contents = [BankContent(bank) for bank in self.banks]

    def _show(self, number: int, array: bool) -> None:
        if self._shown[number] == array:
            return
        if self._shown[number] is None:  # taken away by a process that died, or not: what is not there is EINVAL
            with suppress(KvmError):
                self._set(number, 0)
        if array or self._shown[number]:
            self._set(number, BANK_SIZE if array else 0)
        self._shown[number] = array

    def _set(self, number: int, size: int) -> None:
        where = virt.PLACES["flash"].base + number * BANK_SIZE
        self._vm.set_user_memory_region(FIRST_SLOT + number, where, size, _SEGMENT + number * BANK_SIZE, MEM_READONLY)

    def close(self) -> None:
        """Idempotent."""
        while self.fds:
            os.close(self.fds.pop())
