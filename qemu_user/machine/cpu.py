"""vCPUs from the outside: what ISA they have (for the tree), and the state in which they start.

Reads and writes ONE_REG through protocol.client; called by machine/machine.py. Knows names and numbers of
extensions, not what they do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from protocol.abi import structs_riscv as riscv
from protocol.abi.structs import MP_STATE_RUNNABLE, MP_STATE_STOPPED
from qemu_user.devices.device import FdtNode, PropertyValue
from qemu_user.machine.irq import PHANDLE_CPU

if TYPE_CHECKING:
    from protocol.client import Vcpu

_SINGLE_ORDER = "imafdqlcbkjtpvh"
"""Canonical order of single-letter extensions (unprivileged specification, chapter 27)."""
_MMU_TYPES = {8: "riscv,sv39", 9: "riscv,sv48", 10: "riscv,sv57"}


class Isa(NamedTuple):
    """What the tree says about the harts."""

    extensions: list[str]
    """Lower case, single letters first."""
    mmu_type: str
    timebase: int
    blocks: dict[str, int]
    """cbom, cboz, cbop -> bytes, those that are there."""

    @property
    def text(self) -> str:
        """The riscv,isa string: rv64imafdc_zba_..."""
        single = "".join(name for name in self.extensions if len(name) == 1)
        return "_".join(["rv64" + single, *(name for name in self.extensions if len(name) > 1)])


def read_isa(vcpu: Vcpu, aia: bool) -> Isa:
    """What `vcpu` has. Without `aia` the extension Ssaia stays unsaid: its interrupt half is not wired."""
    letters = _number(vcpu, riscv.CONFIG_ID["isa"])
    single = [name for name in _SINGLE_ORDER if letters >> ord(name) - ord("a") & 1]
    several: list[str] = []
    top = max(riscv.IsaExt)
    for word in range(top // 64 + 1):
        enabled = _number(vcpu, riscv.one_reg(riscv.ISA_EXT, word, riscv.EXT_MULTI_EN))
        several += [
            extension.name.lower()
            for extension in riscv.IsaExt
            if extension // 64 == word and enabled >> extension % 64 & 1 and len(extension.name) > 1
        ]
    if not aia:
        several = [name for name in several if name != "ssaia"]
    blocks = {}
    for name, register in (("cbom", "zicbom"), ("cboz", "zicboz"), ("cbop", "zicbop")):
        if register in several:
            blocks[name] = _number(vcpu, riscv.CONFIG_ID[f"{register}_block_size"])
    mmu = _MMU_TYPES.get(_number(vcpu, riscv.CONFIG_ID["satp_mode"]), "riscv,none")
    frequency = _number(vcpu, riscv.TIMER_ID["frequency"])
    return Isa(single + sorted(several, key=_canonical), mmu, frequency, blocks)


def _canonical(name: str) -> tuple[int, int, str]:
    """Order of multi-letter extensions: Z by their second letter, then S, then X."""
    kind = "zsx".find(name[0])
    return kind, _SINGLE_ORDER.find(name[1]) if kind == 0 else 0, name


def _number(vcpu: Vcpu, register: int) -> int:
    value = vcpu.get_one_reg(register)
    return value if isinstance(value, int) else int.from_bytes(value, "little")


def cpu_nodes(cpus: int, isa: Isa) -> FdtNode:
    """The /cpus node."""
    nodes = []
    for index in range(cpus):
        properties: dict[str, PropertyValue] = {
            "device_type": "cpu",
            "reg": index,
            "status": "okay",
            "compatible": "riscv",
            "riscv,isa": isa.text,
            "riscv,isa-base": "rv64i",
            "riscv,isa-extensions": isa.extensions,
            "mmu-type": isa.mmu_type,
            **{f"riscv,{name}-block-size": size for name, size in isa.blocks.items()},
            "phandle": PHANDLE_CPU + 2 * index + 1,
        }
        controller = FdtNode(
            "interrupt-controller",
            {
                "#interrupt-cells": 1,
                "#address-cells": 0,
                "interrupt-controller": True,
                "compatible": "riscv,cpu-intc",
                "phandle": PHANDLE_CPU + 2 * index,
            },
        )
        nodes.append(FdtNode(f"cpu@{index:x}", properties, [controller]))
    cores = [FdtNode(f"core{index}", {"cpu": PHANDLE_CPU + 2 * index + 1}) for index in range(cpus)]
    topology = FdtNode("cpu-map", {}, [FdtNode("cluster0", {}, cores)])
    return FdtNode(
        "cpus",
        {"#address-cells": 1, "#size-cells": 0, "timebase-frequency": isa.timebase},
        [*nodes, topology],
    )


def set_boot_state(vcpus: list[Vcpu], pc: int, tree: int) -> None:
    """The first hart at `pc` in S-mode with a0 = its id, a1 = tree; the rest are stopped until HSM
    hart_start.
    """
    boot = vcpus[0]
    for register, value in ((riscv.PC, pc), (riscv.A0, 0), (riscv.A1, tree)):
        boot.set_one_reg(register, value)


def reset_state(vcpus: list[Vcpu]) -> None:
    """All registers as after creation, the first hart runnable, the rest stopped: before set_boot_state at a
    reset of the machine."""
    zero = [*riscv.CORE_ID.values(), *riscv.CSR_ID.values()]
    fresh = {riscv.MODE: riscv.MODE_S, riscv.CSR_ID["scounteren"]: 7}
    for vcpu in vcpus:
        for register in zero:
            vcpu.set_one_reg(register, fresh.get(register, 0))
        if _number(vcpu, riscv.TIMER_ID["state"]):
            vcpu.set_one_reg(riscv.TIMER_ID["state"], 0)
        vcpu.set_mp_state(MP_STATE_RUNNABLE if vcpu is vcpus[0] else MP_STATE_STOPPED)
