"""A bare machine for engine tests: RAM, harts, assembled code; no VM objects, no devices."""

from __future__ import annotations

import ctypes
import mmap
import threading

from kvmcore.engine.exits import ExitKind
from kvmcore.engine.loader import Image
from kvmcore.engine.machine import POOL_BYTES, Hart, Machine, SlotView
from tests.framework.asm import assemble

RAM, SIZE = 0x8000_0000, 16 << 20


class Guest:
    """RAM at RAM with `source` at its start; `harts` harts that begin there in S-mode."""

    def __init__(
        self,
        image: Image,
        source: str,
        harts: int = 1,
        pool_bytes: int = POOL_BYTES,
        bitmap: int = 0,
        kind: type[Hart] = Hart,
    ) -> None:
        self.memory = mmap.mmap(-1, SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.program = assemble(source, RAM)
        self.memory[: len(self.program.image)] = self.program.image
        self.machine = Machine(image, pool_bytes=pool_bytes)
        with self.machine.quiesce():
            self.machine.set_slots([SlotView(RAM, SIZE, self.address, dirty_bitmap=bitmap)])
        self.harts = [kind(self.machine, number, number) for number in range(harts)]
        for number, hart in enumerate(self.harts):
            hart.state.pc, hart.state.x[10] = RAM, number

    def __getitem__(self, address: int) -> int:
        at = address - RAM
        return int.from_bytes(self.memory[at : at + 8], "little")

    def __setitem__(self, address: int, value: int) -> None:
        at = address - RAM
        self.memory[at : at + 8] = value.to_bytes(8, "little")

    def put(self, address: int, code: str) -> None:
        """Assemble into RAM behind the guest's back, as a device would write it."""
        data = assemble(code, address).image
        self.memory[address - RAM : address - RAM + len(data)] = data

    def run(self, seconds: float = 60.0, number: int = 0) -> ExitKind:
        """Run a hart until it leaves; KICK if it has not after `seconds`."""
        timer = threading.Timer(seconds, self.harts[number].kick)
        timer.start()
        try:
            return ExitKind(self.harts[number].run())
        finally:
            timer.cancel()

    def run_all(self, seconds: float = 60.0) -> list[ExitKind]:
        """Run every hart on a thread of its own until each has left."""
        results = [ExitKind.NONE] * len(self.harts)

        def work(number: int) -> None:
            results[number] = self.run(seconds, number)

        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(self.harts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results
