"""What the SBI may ask of a VM: kvmcore.sbi.extension.Caller, for one vCPU.

Made and called by exits.py, on the vCPU's own thread. Reaches other vCPUs only by what any thread may do:
pending bits, flush requests, power. Waiting for another hart's fence cannot deadlock: this hart is out of
guest code while it waits, and whoever waits for this one sees that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvmcore import sbi
from kvmcore.sbi.extension import Extension
from kvmcore.vm.csr_access import SSI
from kvmcore.vm.mp_state import STOPPED
from protocol.abi.structs_riscv import SbiExt

if TYPE_CHECKING:
    from kvmcore.vm.vcpu import Vcpu

STARTED_STATUS, STOPPED_STATUS, SUSPENDED_STATUS = 0, 1, 4
_SPEC_2_0, _SPEC_3_0 = 2 << 24, 3 << 24
_LINUX_6_12_107, _LINUX_7_2_13 = 0x060C6B, 0x07020D
PAGES_WORTH_NAMING = 16
"""A range of more pages than this is fenced as a whole address space."""
_PAGE = 4096
_PAUSE_SECONDS = 20e-6


class Hypercalls:
    """The Caller of one vCPU."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._vm = vcpu.vm
        self.hart_id = vcpu.id

    # -- BASE --------------------------------------------------------------------------------------

    @property
    def _as_6_12(self) -> bool:
        compat = self._vm.session.compat
        return compat.is_6_12 or compat.extended

    def spec_version(self) -> int:
        return _SPEC_2_0 if self._as_6_12 else _SPEC_3_0

    def implementation_version(self) -> int:
        return _LINUX_6_12_107 if self._as_6_12 else _LINUX_7_2_13

    def machine_id(self, name: str) -> int:
        return self._vcpu.registers.machine_id(name)

    def allows(self, extension: Extension) -> bool:
        """Whether this vCPU has the extension switched on."""
        return extension.switch is None or self._vcpu.registers.sbi_enabled(extension.switch)

    def probe(self, eid: int) -> int:
        extension = sbi.find(eid)
        return int(extension is not None and self.allows(extension))

    def is_forwarded(self, eid: int) -> bool:
        extension = sbi.find(eid)
        forwarded = (SbiExt.EXPERIMENTAL, SbiExt.VENDOR)
        return extension is not None and extension.switch in forwarded and self.allows(extension)

    # -- harts -------------------------------------------------------------------------------------

    def harts(self) -> Sequence[int]:
        return list(self._vm.vcpus_by_id)

    def set_timer(self, when: int) -> None:
        self._vcpu.hart.state.stimecmp = when

    def send_ipi(self, hart: int) -> None:
        target = self._vm.vcpus_by_id[hart]
        target.hart.set_pending(SSI)
        target.wake()

    def fence_i(self, harts: Sequence[int]) -> None:
        targets = [self._vm.vcpus_by_id[hart] for hart in harts]
        for target in targets:
            target.hart.flush_icache()
        self._wait(targets)

    def sfence_vma(self, harts: Sequence[int], start: int, size: int, asid: int | None) -> None:
        targets = [self._vm.vcpus_by_id[hart] for hart in harts]
        pages: list[int | None] = [None]
        if size <= PAGES_WORTH_NAMING * _PAGE:
            first = start & -_PAGE
            pages = list(range(first, start + max(size, 1), _PAGE))
        self._vm.stats.remote_tlb_flush_requests += 1
        for target in targets:
            for page in pages:
                target.hart.flush_tlb(page, asid)
        self._wait(targets)

    def _wait(self, targets: list[Vcpu]) -> None:
        """Until no target can use what it had before the fence: it has flushed, or is not in guest code.

        A hart outside guest code flushes before it enters it again.
        """
        waited = False
        for target in targets:
            if target is self._vcpu:
                continue
            pause = 0.0
            while target.hart.flush_pending and target.hart.running and not self._vm.dead:
                waited = True
                time.sleep(pause)  # the first time only a yield; later long enough to give the GIL away
                pause = _PAUSE_SECONDS
        if waited:
            self._vm.stats.remote_tlb_flush += 1

    # -- memory and power --------------------------------------------------------------------------

    def is_memory(self, gpa: int) -> bool:
        return self._vm.memory.lookup(gpa) is not None

    def hart_status(self, hart: int) -> int:
        target = self._vm.vcpus_by_id[hart]
        if target.mp_state == STOPPED:
            return STOPPED_STATUS
        return SUSPENDED_STATUS if target.sleeping else STARTED_STATUS

    def hart_start(self, hart: int, pc: int, opaque: int) -> bool:
        target = self._vm.vcpus_by_id[hart]
        with self._vm.power_lock:
            if target.mp_state != STOPPED:
                return False
            target.request_reset(pc, opaque)
        return True

    def hart_stop(self) -> None:
        with self._vm.power_lock:
            self._vcpu.power_off()
