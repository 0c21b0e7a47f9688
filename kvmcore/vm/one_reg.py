"""A vCPU's registers as KVM_GET/SET_ONE_REG and KVM_GET_REG_LIST know them (KVM_ABI 1.11).

`Registers` hangs on the vCPU. Reading is always allowed; configuration freezes when the vCPU first runs.
What a CSR cannot hold is stored raw until the vCPU runs, as Linux does, and made legal then. Called by
kvmcore/ioctl/vcpu.py with the vCPU's mutex held, and by mp_state.reset(). Field layout is the engine's:
kvmcore/engine/hart_state.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from errno import EBUSY, EINVAL, ENOENT
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from kvmcore.isa.paging import LEVELS
from kvmcore.vm import csr_access
from kvmcore.vm import isa_extensions as isa
from protocol.abi import structs_riscv as ids
from protocol.abi.errors import KvmError
from protocol.abi.structs_riscv import IsaExt, SbiExt

if TYPE_CHECKING:
    from kvmcore.vm.vcpu import Vcpu

FREQUENCY = 10_000_000
SATP_MODE = max(LEVELS)
"""The widest address translation that guests may use."""
_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1
_SIP_MASK, _SIP_MASK_6_12 = 0x2222, 0x6222
_SBI_ON = frozenset(
    (
        SbiExt.V01, SbiExt.TIME, SbiExt.IPI, SbiExt.RFENCE, SbiExt.SRST, SbiExt.HSM,
        SbiExt.EXPERIMENTAL, SbiExt.VENDOR,
    )
)  # fmt: skip
"""SBI extensions that are on in a new vCPU. V01 is a switch only: its calls do not exist (as in Debian's
kernel).
"""
_SBI_OFFERED = _SBI_ON | {SbiExt.DBCN}


_lists: dict[tuple[bool, frozenset[IsaExt]], list[int]] = {}
"""What Registers.ids() gives by configuration: of the extensions, few can be switched."""


@cache
def _names(extensions: frozenset[IsaExt]) -> frozenset[str]:
    """As the engine calls them."""
    return frozenset(extension.name.lower() for extension in extensions)


class _Register(NamedTuple):
    """How one register is read and written; `size` its bytes."""

    size: int
    get: Callable[[Registers], int]
    set: Callable[[Registers, int], None]


def _refuse(reason: str, errno: int = EINVAL) -> KvmError:
    return KvmError(errno, reason=reason)


class Registers:
    """All registers of one vCPU, and its configuration: ISA, SBI extensions, machine ids."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._isa = set(isa.OFFERED)
        self._sbi = set(_SBI_ON)
        self._machine_ids = {"mvendorid": 0, "marchid": 0, "mimpid": 0}
        self._raw: dict[str, int] = {}
        """CSRs written by user space since the vCPU last ran, as written."""
        self.reset(new=True)

    # -- for the rest of kvmcore -------------------------------------------------------------------

    def machine_id(self, name: str) -> int:
        """mvendorid, marchid or mimpid."""
        return self._machine_ids[name]

    def sbi_enabled(self, extension: SbiExt) -> bool:
        """Whether the guest may use an SBI extension."""
        return extension in self._sbi

    def entering(self) -> None:
        """The vCPU runs: what was stored raw is what the hart has made of it from now on."""
        self._raw.clear()

    def interrupt_line_changed(self) -> None:
        """KVM_INTERRUPT: sip is no longer what was last written to it."""
        self._raw.pop("sip", None)

    def reset(self, *, new: bool = False) -> None:
        """The hart's state is a new vCPU's; `new`: it is one. Configuration stays."""
        self._raw = {"sstatus": 0}  # the hart's own has UXL set, once it has run
        if new:
            csr_access.begin(self._vcpu.hart)
        else:
            csr_access.reset(self._vcpu.hart)
        self._apply_isa()

    def _apply_isa(self) -> None:
        self._vcpu.hart.set_extensions(_names(frozenset(self._isa)))

    # -- KVM_GET/SET_ONE_REG -----------------------------------------------------------------------

    def get(self, register: int) -> bytes:
        """The value, as many bytes as the id says. ENOENT: no such register; EINVAL: wrong size in the id."""
        found = self._find(register)
        return found.get(self).to_bytes(found.size, "little")

    def size(self, register: int) -> int:
        """The register's bytes; ENOENT and EINVAL as get()."""
        return self._find(register).size

    def set(self, register: int, value: bytes) -> None:
        """Write a register. ENOENT, EINVAL as get(); EINVAL: a value that is refused; EBUSY: frozen."""
        self._find(register).set(self, int.from_bytes(value, "little"))

    def ids(self) -> list[int]:
        """Every register that get() knows, in Linux's order."""
        key = (self._is_6_12, frozenset(self._isa))
        found = _lists.get(key)
        if found is None:
            found = _lists[key] = list(self._ids())
        return found

    def _find(self, register: int) -> _Register:
        found = _TABLE.get(register & ((1 << 52) - 1)) or self._extension(register)
        if found is None:
            if register >> 24 & 0xFF in _U64_TYPES and ids.one_reg_size(register) != 8:
                raise _refuse("register size")
            raise _refuse(f"no register {register:#x}", ENOENT)
        if ids.one_reg_size(register) != found.size:
            raise _refuse("register size")
        self._check_available(register)
        return found

    def _check_available(self, register: int) -> None:
        needs = _NEEDS.get(register >> 16 & 0xFFFF) or _CONFIG_NEEDS.get(register & ((1 << 52) - 1))
        if needs is not None and needs not in self._isa:
            raise _refuse(f"{needs.name} is off", ENOENT)
        if self._is_6_12 and register & ((1 << 52) - 1) == ids.CONFIG << 24 | 7:
            raise _refuse("no such register in Linux 6.12", ENOENT)

    @property
    def _is_6_12(self) -> bool:
        return self._vcpu.session.compat.is_6_12

    def _ids(self) -> Iterator[int]:
        for name, register in ids.CONFIG_ID.items():
            if not (self._is_6_12 and name == "zicbop_block_size") and self._config_present(name):
                yield register
        yield from ids.CORE_ID.values()
        yield from ids.CSR_ID.values()
        if IsaExt.SSAIA in self._isa:
            yield from ids.CSR_AIA_ID.values()
        yield from ids.TIMER_ID.values()
        if IsaExt.F in self._isa:
            yield from (ids.one_reg(ids.FP_F, index, 0, ids.SIZE_U32) for index in range(33))
        if IsaExt.D in self._isa:
            yield from ids.FP_D_ID.values()
        for extension in IsaExt:
            if self._isa_known(extension):
                yield ids.one_reg(ids.ISA_EXT, extension, ids.EXT_SINGLE)
        for switch in SbiExt:
            if switch in _SBI_OFFERED:
                yield ids.one_reg(ids.SBI_EXT, switch, ids.EXT_SINGLE)

    def _config_present(self, name: str) -> bool:
        needs = {"zicbom_block_size": IsaExt.ZICBOM, "zicboz_block_size": IsaExt.ZICBOZ}.get(name)
        return needs is None or needs in self._isa

    # -- configuration -----------------------------------------------------------------------------

    def _frozen(self) -> bool:
        return self._vcpu.ran_once

    def _get_isa(self) -> int:
        return sum(1 << bit for extension, bit in isa.SINGLE_LETTER.items() if extension in self._isa)

    def _set_isa(self, value: int) -> None:
        if value >> 26:
            raise _refuse("isa has single-letter extensions only")
        if value == self._get_isa():
            return
        if self._frozen():
            raise _refuse("the vCPU has run", EBUSY)
        for extension, bit in isa.SINGLE_LETTER.items():
            if extension in isa.SWITCHABLE:
                (self._isa.add if value >> bit & 1 else self._isa.discard)(extension)
        self._apply_isa()

    def _set_block_size(self, value: int) -> None:
        if value not in (0, isa.CBO_BLOCK):
            raise _refuse("the block size is the host's")

    def _set_machine_id(self, name: str, value: int) -> None:
        if value == self._machine_ids[name]:
            return
        if self._frozen():
            raise _refuse("the vCPU has run", EBUSY)
        self._machine_ids[name] = value

    def _set_satp_mode(self, value: int) -> None:
        if value != SATP_MODE:
            raise _refuse("satp_mode is the host's")

    # -- CSRs, timer, floating point ---------------------------------------------------------------

    def _get_csr(self, name: str) -> int:
        raw = self._raw.get(name)
        return raw if raw is not None else csr_access.read(self._vcpu.hart, name)

    def _set_csr(self, name: str, value: int) -> None:
        if name == "sip":
            value &= _SIP_MASK_6_12 if self._is_6_12 else _SIP_MASK
        csr_access.write(self._vcpu.hart, name, value)
        self._raw[name] = value

    def _set_frequency(self, value: int) -> None:
        if value != FREQUENCY:
            raise _refuse("the time base is fixed at 10 MHz")

    def _get_time(self) -> int:
        return self._vcpu.vm.machine.time()

    def _set_time(self, value: int) -> None:
        machine = self._vcpu.vm.machine
        with self._vcpu.vm.lock:
            host_time = machine.time() - int(machine.state.time_base)
            machine.set_time(value - host_time)

    def _get_timer_state(self) -> int:
        return int(self._vcpu.hart.state.stimecmp != _U64)

    def _set_timer_state(self, value: int) -> None:
        if value == 1:
            return  # the comparator works as soon as it is written, as Sstc's does
        if not self._get_timer_state():
            raise _refuse("the timer is off")
        self._vcpu.hart.state.stimecmp = _U64

    def _set_compare(self, value: int) -> None:
        self._vcpu.hart.state.stimecmp = value

    def _get_fcsr(self) -> int:
        return csr_access.read(self._vcpu.hart, "fcsr")

    def _set_fcsr(self, value: int) -> None:
        csr_access.write(self._vcpu.hart, "fcsr", value)

    # -- ISA_EXT, SBI_EXT --------------------------------------------------------------------------

    def _extension(self, register: int) -> _Register | None:
        """Registers that stand for extensions: single ones and bitmaps."""
        kind, subtype, index = register >> 24 & 0xFF, register >> 16 & 0xFF, register & 0xFFFF
        if register >> 32 & 0xFFFFF or kind not in (ids.ISA_EXT, ids.SBI_EXT):
            return None
        is_isa = kind == ids.ISA_EXT
        if subtype == ids.EXT_SINGLE:
            if not (self._isa_known(index) if is_isa else index in _SBI_OFFERED):
                return None
            on: set[int] = self._isa if is_isa else self._sbi  # type: ignore[assignment]
            change = self._set_isa_extension if is_isa else self._set_sbi_extension
            return _Register(8, lambda _: int(index in on), lambda _, value: change(index, value))
        last = (isa.MAX_6_12 if self._is_6_12 else max(IsaExt)) // 64 if is_isa else 0
        if subtype not in (ids.EXT_MULTI_EN, ids.EXT_MULTI_DIS) or index > last:
            return None
        inverted = _U64 if subtype == ids.EXT_MULTI_DIS else 0
        return _Register(
            8,
            lambda _: self._bitmap(is_isa, index) ^ inverted,
            lambda _, value: self._set_bitmap(is_isa, index, value, not inverted),
        )

    def _isa_known(self, index: int) -> bool:
        if self._is_6_12 and index > isa.MAX_6_12:
            return False
        return index in isa.OFFERED or index in isa.NEVER

    def _set_isa_extension(self, index: int, value: int) -> None:
        extension = IsaExt(index)
        if value == (extension in self._isa):
            return
        if self._frozen():
            raise _refuse("the vCPU has run", EBUSY)
        if value not in (0, 1) or extension not in isa.SWITCHABLE:
            raise _refuse(f"{extension.name} cannot be switched to {value}")
        (self._isa.add if value else self._isa.discard)(extension)
        self._apply_isa()

    def _set_sbi_extension(self, index: int, value: int) -> None:
        if self._frozen():
            raise _refuse("the vCPU has run", EBUSY)
        if value not in (0, 1):
            raise _refuse("an extension is on (1) or off (0)")
        (self._sbi.add if value else self._sbi.discard)(SbiExt(index))

    def _bitmap(self, is_isa: bool, word: int) -> int:
        on = self._isa if is_isa else self._sbi
        return sum(
            1 << index % 64 for index in on if index // 64 == word and (not is_isa or self._isa_known(index))
        )

    def _set_bitmap(self, is_isa: bool, word: int, bits: int, on: bool) -> None:
        """Switch every extension whose bit is set, as far as it lets itself be switched (Linux ignores the
        rest).
        """
        if not is_isa and self._frozen():
            raise _refuse("the vCPU has run", EBUSY)
        for bit in range(64):
            index = word * 64 + bit
            if bits >> bit & 1 and (self._isa_known(index) if is_isa else index in _SBI_OFFERED):
                try:
                    (self._set_isa_extension if is_isa else self._set_sbi_extension)(index, int(on))
                except KvmError:
                    continue


# -- the table -------------------------------------------------------------------------------------

_U64_TYPES = frozenset((ids.CONFIG, ids.CORE, ids.CSR, ids.TIMER, ids.ISA_EXT, ids.SBI_EXT, ids.SBI_STATE))
_NEEDS = {
    ids.CSR << 8 | ids.CSR_AIA: IsaExt.SSAIA,
    ids.FP_F << 8: IsaExt.F,
    ids.FP_D << 8: IsaExt.D,
}
"""type << 8 | subtype -> the extension without which the registers are not there."""
_CONFIG_NEEDS = {ids.CONFIG << 24 | 1: IsaExt.ZICBOM, ids.CONFIG << 24 | 5: IsaExt.ZICBOZ}
_HART_CSRS = ("siselect",)


def _state(name: str) -> _Register:
    """A register that is a 64-bit field of the hart."""
    return _Register(
        8,
        lambda regs: int(getattr(regs._vcpu.hart.state, name)),
        lambda regs, value: setattr(regs._vcpu.hart.state, name, value),
    )


def _array(field: str, index: int, size: int = 8) -> _Register:
    """An element of an array field; of 4 bytes: its low half."""

    def get(regs: Registers) -> int:
        return int(getattr(regs._vcpu.hart.state, field)[index]) & ((1 << 8 * size) - 1)

    def put(regs: Registers, value: int) -> None:
        array = getattr(regs._vcpu.hart.state, field)
        array[index] = value if size == 8 else int(array[index]) & ~_U32 | value

    return _Register(size, get, put)


def _csr(name: str) -> _Register:
    return _Register(8, lambda regs: regs._get_csr(name), lambda regs, value: regs._set_csr(name, value))


def _constant(value: int, check: Callable[[Registers, int], None]) -> _Register:
    return _Register(8, lambda regs: value, check)


def _machine_id(name: str) -> _Register:
    return _Register(
        8, lambda regs: regs._machine_ids[name], lambda regs, value: regs._set_machine_id(name, value)
    )


def _ignore(regs: Registers, value: int) -> None:
    """Interrupt priorities and the high halves of 64-bit CSRs on RV32: read-only zero."""


def _set_pc(regs: Registers, value: int) -> None:
    """Who moves pc from outside has often put new code and page tables in place too: look afresh at both."""
    hart = regs._vcpu.hart
    hart.state.pc = value
    hart.flush_tlb()
    hart.flush_icache()


def _set_mode(regs: Registers, value: int) -> None:
    regs._vcpu.hart.state.mode = ids.MODE_S if value == ids.MODE_S else ids.MODE_U


def _table() -> Iterator[tuple[int, _Register]]:
    config = {
        "isa": _Register(8, Registers._get_isa, Registers._set_isa),
        "zicbom_block_size": _constant(isa.CBO_BLOCK, Registers._set_block_size),
        "mvendorid": _machine_id("mvendorid"),
        "marchid": _machine_id("marchid"),
        "mimpid": _machine_id("mimpid"),
        "zicboz_block_size": _constant(isa.CBO_BLOCK, Registers._set_block_size),
        "satp_mode": _constant(SATP_MODE, Registers._set_satp_mode),
        "zicbop_block_size": _constant(isa.CBO_BLOCK, Registers._set_block_size),
    }
    for name, register in config.items():
        yield ids.CONFIG_ID[name], register
    yield ids.CORE_ID["pc"], _Register(8, lambda regs: int(regs._vcpu.hart.state.pc), _set_pc)
    for index, name in enumerate(ids.CORE_NAMES[1:-1], 1):
        yield ids.CORE_ID[name], _array("x", index)
    yield ids.CORE_ID["mode"], _Register(8, lambda regs: int(regs._vcpu.hart.state.mode), _set_mode)
    for name, number in ids.CSR_ID.items():
        yield number, _csr(name)
    for name, number in ids.CSR_AIA_ID.items():
        yield number, _csr(name) if name in _HART_CSRS else _constant(0, _ignore)
    yield ids.TIMER_ID["frequency"], _constant(FREQUENCY, Registers._set_frequency)
    yield ids.TIMER_ID["time"], _Register(8, Registers._get_time, Registers._set_time)
    yield (
        ids.TIMER_ID["compare"],
        _Register(8, lambda regs: int(regs._vcpu.hart.state.stimecmp), Registers._set_compare),
    )
    yield ids.TIMER_ID["state"], _Register(8, Registers._get_timer_state, Registers._set_timer_state)
    fcsr = _Register(4, Registers._get_fcsr, Registers._set_fcsr)
    for index in range(32):
        yield ids.one_reg(ids.FP_F, index), _array("f", index, 4)
        yield ids.one_reg(ids.FP_D, index), _array("f", index)
    yield ids.one_reg(ids.FP_F, 32), fcsr
    yield ids.one_reg(ids.FP_D, 32), fcsr


_TABLE: dict[int, _Register] = {number & ((1 << 52) - 1): register for number, register in _table()}
"""Registers by id, without architecture and size: type, subtype, index."""
