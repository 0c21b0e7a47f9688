"""A PCI function: configuration space, BARs, MSI-X and INTx put together; read/write are its configuration space.

devices/virtio/pci.py builds on it; host.py finds it by slot and its BARs by address. It has no tree node: guests
probe. Configuration and BAR accesses come from vCPU threads, interrupts are raised from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import msgspec

from qemu_user.devices.device import Device, InterruptLine, State, require
from qemu_user.devices.pci import config_space as cfg
from qemu_user.devices.pci.config_space import Bar, ConfigSpace, Identity
from qemu_user.devices.pci.msix import CAPABILITY as MSIX_CAPABILITY
from qemu_user.devices.pci.msix import MakeVector, Msix, MsixState

EXPRESS_CAPABILITY = 0x10
_ROOT_COMPLEX_ENDPOINT = 9
_ROLE_BASED_ERRORS = 1 << 15
MSIX_BAR = 1
MSIX_BAR_SIZE = 0x1000
_PENDING_OFFSET = 0x800
MAX_VECTORS = _PENDING_OFFSET // 16


class FunctionState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every function saves."""

    config: bytes
    msix: MsixState | None
    intx: bool


class PciFunctionState(State, frozen=True, tag="pci_function", kw_only=True):
    """A function with nothing of its own."""

    version: Literal[1] = 1
    function: FunctionState


class PciFunction(Device):
    """`vectors`: how many MSI-X vectors (0: none; at most 128), `make`: what delivers them (None: no MSI here)."""

    region_size = cfg.SIZE
    State: ClassVar[type[State]] = PciFunctionState

    def __init__(
        self, name: str, identity: Identity, bars: list[Bar], vectors: int = 0, make: MakeVector | None = None, pin: int = 0
    ) -> None:
        super().__init__(name)
        self.msix = Msix(min(vectors, MAX_VECTORS), make) if vectors and make else None
        if self.msix is not None:
            bars = [*bars, Bar(MSIX_BAR, MSIX_BAR_SIZE)]
        self.config_space = ConfigSpace(identity, bars, pin)
        self._config_lock = threading.RLock()
        self._intx: InterruptLine | None = None
        self._intx_level = False
        self._remapped: Callable[[], None] = lambda: None
        self._physical: Callable[[int, int], int | None] = lambda address, size: None
        self.mapped: dict[int, int] = {}
        """BAR -> its bus address, while it is decoded."""
        self.slot = 0
        if self.msix is not None:
            body, mask = self.msix.capability(MSIX_BAR, 0, _PENDING_OFFSET)
            self._msix_at = self.config_space.add_capability(MSIX_CAPABILITY, body, mask)

    def add_express_capability(self) -> None:
        """PCI Express 7.5.3, version 2: an integrated endpoint of the root complex, without a link of its own."""
        body = bytearray(0x3A)
        body[0:2] = (2 | _ROOT_COMPLEX_ENDPOINT << 4).to_bytes(2, "little")
        body[2:6] = _ROLE_BASED_ERRORS.to_bytes(4, "little")
        mask = bytearray(8)
        mask[6:8] = (0x58FF).to_bytes(2, "little")  # device control but for phantom functions, aux power and reset
        self.config_space.add_capability(EXPRESS_CAPABILITY, bytes(body), bytes(mask))

    def attach(
        self,
        slot: int,
        intx: InterruptLine,
        remapped: Callable[[], None],
        physical: Callable[[int, int], int | None],
    ) -> None:
        """The bridge plugs us in: our wire, whom to tell that BARs moved, and where the guest finds a bus address."""
        self.slot, self._intx, self._remapped, self._physical = slot, intx, remapped, physical

    # -- configuration space -----------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        return self.config_space.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._config_lock:
            self.config_space.write(offset, size, value & (1 << 8 * size) - 1)
            self._apply()

    def _apply(self) -> None:
        """Registers have changed: what follows from them."""
        space = self.config_space
        command = space.command
        if self.msix is not None:
            self.msix.control(space.read(self._msix_at + 2, 2), bool(command & cfg.BUS_MASTER))
        self._drive_intx()
        mapped = {
            index: space.bar_address(index)
            for index, bar in space.bars.items()
            if command & (cfg.IO_ENABLE if bar.kind == "io" else cfg.MEMORY_ENABLE)
        }
        if mapped != self.mapped:
            before, self.mapped = self.mapped, mapped
            for index, bar in space.bars.items():
                if before.get(index) != (now := mapped.get(index)):
                    self.bar_moved(index, None if now is None else self._physical(now, bar.size))
            self._remapped()

    def bar_moved(self, index: int, address: int | None) -> None:
        """BAR `index` answers at guest-physical `address` now, or nowhere."""

    # -- BARs --------------------------------------------------------------------------------------

    def read_bar(self, index: int, offset: int, size: int) -> int:
        """A load from a BAR, inside it; 1, 2, 4 or 8 bytes."""
        if self.msix is not None and index == MSIX_BAR:
            if offset + size <= self.msix.table_size:
                return self.msix.read_table(offset, size)
            if offset >= _PENDING_OFFSET and offset - _PENDING_OFFSET + size <= self.msix.pending_size:
                return self.msix.read_pending(offset - _PENDING_OFFSET, size)
        return self.bad_access(offset, size)

    def write_bar(self, index: int, offset: int, size: int, value: int) -> None:
        """A store to a BAR."""
        msix = self.msix
        if msix is not None and index == MSIX_BAR and offset + size <= msix.table_size and size in (4, 8) and not offset % size:
            msix.write_table(offset, size, value & (1 << 8 * size) - 1)
        else:
            self.bad_access(offset, size)

    # -- INTx --------------------------------------------------------------------------------------

    def set_intx(self, level: bool) -> None:
        """Assert or release our pin. Any thread."""
        with self._config_lock:
            self._intx_level = level
            self._drive_intx()

    def _drive_intx(self) -> None:
        space = self.config_space
        status = space.read(cfg.STATUS, 2) & ~cfg.INTX_STATUS
        space.set(cfg.STATUS, 2, status | (cfg.INTX_STATUS if self._intx_level else 0))
        if self._intx is not None:
            # With MSI-X enabled a function must not use its pin (6.8.3.3).
            if self._intx_level and not space.command & cfg.INTX_DISABLE:
                self._intx.assert_line()
            else:
                self._intx.release_line()

    # -- life --------------------------------------------------------------------------------------

    def save_function(self) -> FunctionState:
        return FunctionState(
            config=self.config_space.save(), msix=self.msix.save() if self.msix else None, intx=self._intx_level
        )

    def check_function(self, state: FunctionState) -> None:
        """StateError unless restore_function() can take `state`."""
        self.config_space.check(state.config, self.name)
        if self.msix is not None:
            self.msix.check(state.msix, self.name)
        else:
            require(state.msix is None, f"{self.name}: saved with MSI-X, which this machine has not")

    def restore_function(self, state: FunctionState) -> None:
        with self._config_lock:
            self.config_space.restore(state.config)
            if self.msix is not None and state.msix is not None:
                self.msix.restore(state.msix)
            self._intx_level = state.intx
            self._apply()

    def save(self) -> Any:
        return PciFunctionState(function=self.save_function())

    def restore(self, state: Any) -> None:
        self.check_function(state.function)
        self.restore_function(state.function)

    def reset(self) -> None:
        with self._config_lock:
            self.config_space.reset()
            if self.msix is not None:
                self.msix.reset()
            self._intx_level = False
            self._apply()
