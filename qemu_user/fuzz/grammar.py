"""Random sequences, deterministic by seed, from the one table of ioctls (protocol/abi/ioctls.py) and rules.py.

A sequence keeps the order that clients keep (memory, vCPU, device, then the rest) most of the time, breaks it
sometimes, and sometimes does things to the wrong resource, to a closed one, or to one that never was.
"""

from __future__ import annotations

from random import Random
from typing import Any

from protocol.abi import structs
from protocol.abi.capabilities import Cap
from protocol.abi.ioctls import BY_NAME, IOCTLS, KINDS, Ioctl
from protocol.abi.structs import Layout
from protocol.codec import control
from qemu_user.fuzz import guest_code, rules, setups
from qemu_user.fuzz.sequence import Op

LENGTH = 25
"""Operations in a usual sequence."""
SHORT = 10
"""Operations in a short one."""
_NEVER = {"CREATE_VM"}
"""Sequences run in one VM; CREATE_VM is what starts them."""
_ROWS: dict[str, tuple[Ioctl, ...]] = {
    kind: tuple(row for row in IOCTLS if kind in row.on and row.name not in _NEVER) for kind in KINDS
}
_WEIGHT = {"system": 1, "vm": 9, "vcpu": 8, "device": 3}
_SCALAR = {"u8": 8, "u16": 16, "u32": 32, "s32": 32, "u64": 64}


class Grammar:
    """Makes sequences. `guest` also has guests run code of their own; `generic` only what every KVM has (differential)."""

    def __init__(self, seed: int, *, guest: bool = True, generic: bool = False) -> None:
        self.seed, self.guest, self.generic = seed, guest, generic

    def sequence(self, index: int) -> list[Op]:
        """Sequence number `index` of this seed."""
        rng = Random(f"{self.seed}:{index}")
        ops = self._preamble(rng)
        length = rng.choice((5, LENGTH, LENGTH, LENGTH, 60))
        while len(ops) < length:
            ops.append(self._op(rng))
        return ops

    def together(self, index: int, parts: int) -> list[Op]:
        """As many sequences, short ones, on one VM, where a VM is what takes the time: the first opens it, the others go on."""
        rng = Random(f"{self.seed}:{index}:{parts}")
        ops = self._preamble(rng)
        while len(ops) < parts * SHORT:
            ops.append(self._op(rng))
        return ops

    # -- openings -----------------------------------------------------------------------------------------------

    def _preamble(self, rng: Random) -> list[Op]:
        ops: list[Op] = []
        if rng.random() < 0.85:
            ops.append(Op("map", ("vm", 0), arg=0))
        if rng.random() < 0.75:
            region = {"slot": 0, "guest_phys_addr": 0x80000000, "memory_size": rules.MAP_SIZE, "userspace_addr": {"map": 0}}
            ops.append(Op("ioctl", ("vm", 0), "SET_USER_MEMORY_REGION", members=region | {"flags": rng.choice((0, 0, 1))}))
        if not self.generic and rng.random() < 0.15:
            ring = {"cap": Cap.DIRTY_LOG_RING_ACQ_REL, "args": [rng.choice((4096, 65536)), 0, 0, 0]}
            ops += [Op("ioctl", ("vm", 0), "ENABLE_CAP", members=ring)] if rng.random() < 0.6 else setups.ring(rng)
        aia = not self.generic and rng.random() < 0.5
        if aia:
            ops.append(Op("ioctl", ("vm", 0), "CREATE_DEVICE", members={"type": structs.DEV_TYPE_RISCV_AIA}))
        vcpus = rng.choice((0, 1, 1, 1, 2))
        for vcpu in range(vcpus):
            ops.append(Op("ioctl", ("vm", 0), "CREATE_VCPU", arg=vcpu))
        if aia and rng.random() < 0.7:
            ops += (setups.aia if rng.random() < 0.5 else setups.imsic)(rng, vcpus)
        if self.guest and not self.generic and rng.random() < 0.3:
            ops += guest_code.load(rng)
        if not self.generic and rng.random() < 0.5:
            ops += rng.choice(setups.SETUPS)(rng)
        if rng.random() < 0.1:
            rng.shuffle(ops)
        return ops

    # -- one operation --------------------------------------------------------------------------------------------

    def _op(self, rng: Random) -> Op:
        chance = rng.random()
        if chance < 0.80:
            return self._ioctl(rng)
        if chance < 0.84 and not self.generic:
            return self._run(rng)
        if chance < 0.87:
            return Op("map", ("vm", 0), arg=rng.randrange(rules.MAPS))
        if chance < 0.89:
            return Op("unmap", ("vm", 0), arg=rng.randrange(rules.MAPS))
        if chance < 0.92:
            return Op("eventfd", ("vm", 0), arg=rng.choice((0, 0, 1, (1 << 64) - 2)))
        if chance < 0.94 or self.generic:
            kinds = ("vcpu", "device", "memfd", "file", "eventfd", "vcpu") if rng.random() < 0.98 else ("vm",)
            return Op("close", _resource(rng, kinds))
        if chance < 0.96:
            return Op("ioctl", _resource(rng, KINDS), extra={"request": _request(rng)}, arg=rules.boundary(64)(rng))
        if chance < 0.97:
            return Op("scribble", ("vcpu", rng.randrange(2)), arg=rng.choice((0, 1, 8, 32, 288, 4032, 4052, 4096, 4100)),
                      tail=rng.randbytes(rng.choice((1, 4, 8, 64))).hex())  # fmt: skip
        return self._control(rng)

    def _ioctl(self, rng: Random) -> Op:
        kind = rng.choices(KINDS, [_WEIGHT[kind] for kind in KINDS])[0]
        rows = [row for row in _ROWS[kind] if not self.generic or row.name in GENERIC]
        if not rows:
            return self._ioctl(rng)
        row = rng.choice(rows)
        on = (kind, rng.randrange(2) if kind in ("vcpu", "device") and rng.random() < 0.3 else 0)
        if rng.random() < 0.03:
            on = _resource(rng, KINDS)
        if row.name == "RUN":
            return self._run(rng, at_once=self.generic)
        op = build(rng, row, on)
        if self.generic and row.name == "CREATE_DEVICE" and op.members is not None:
            op.members["type"] = rng.choice((0, 12, 99, 0xFFFFFFFF))  # none that either has
        return op

    @staticmethod
    def _run(rng: Random, at_once: bool = False) -> Op:
        return Op("run", ("vcpu", rng.randrange(2) if rng.random() < 0.3 else 0), "RUN", arg=rules.INTEGERS["RUN"](rng),
                  extra={"immediate": int(at_once or rng.random() < 0.3), "brief": int(rng.random() < 0.97)})  # fmt: skip

    @staticmethod
    def _control(rng: Random) -> Op:
        request = rng.choice((control.READ, control.KICK, control.READ_GPA, control.WRITE_GPA, control.DUP, control.GET_STATE,
                              control.SET_STATE, control.PING, control.CONTROL << 8 | rng.getrandbits(8)))  # fmt: skip
        if request in (control.CLOSE, control.GOODBYE, control.HELLO):
            request = control.PING
        size = rng.choice((0, 4, 4, 4, 8, 8, 16, 64, 65536))
        payload = control.LENGTH.pack(rng.choice((0, 8, 4096, 1 << 19, (1 << 32) - 1))) if size == 4 else rng.randbytes(size)
        return Op("control", _resource(rng, (*KINDS, "file", "memfd")), arg=rng.choice((0, 1, 0x80000000, 0x8000FFFC, 1 << 63)),
                  tail=payload.hex(), extra={"request": request})  # fmt: skip


def _resource(rng: Random, kinds: tuple[str, ...]) -> tuple[str, int]:
    return (rng.choice(kinds), rng.choice((0, 0, 0, 1, 2, 99)))


def _request(rng: Random) -> int:
    """A request number that is nearly one of the table's."""
    number = rng.choice(IOCTLS).number
    return rng.choice((number ^ 1 << rng.randrange(32), number & 0xFFFF, number | 0x3FFF0000, rng.getrandbits(32)))


def build(rng: Random, row: Ioctl, on: tuple[str, int]) -> Op:
    """An ioctl of this row with arguments by rule, or a pointer that leads nowhere."""
    if row.argument is None:
        return Op("ioctl", on, row.name, arg=rules.INTEGERS.get(row.name, rules.boundary(64))(rng))
    if rng.random() < 0.02:
        return Op("ioctl", on, row.name, arg=rng.choice((0, 1, 1 << 63, (1 << 64) - 8)))
    members = _members(rng, row.argument)
    tail = b""
    if row.name == "SET_GSI_ROUTING":
        count = members["nr"] if members["nr"] <= 3 else 2
        entries = [
            structs.IRQ_ROUTING_ENTRY.build(**_members(rng, structs.IRQ_ROUTING_ENTRY, _routing_target)) for _ in range(count)
        ]
        tail = b"".join(entries)
    elif row.name == "GET_REG_LIST":
        tail = bytes(8 * min(members["n"], 256))
    elif row.tail:
        tail = rng.randbytes(rng.choice((0, 4, 8)))
    return Op("ioctl", on, row.name, members=members, tail=tail.hex())


def _routing_target(rng: Random) -> bytes:
    if rng.random() < 0.5:
        return structs.IRQ_ROUTING_IRQCHIP.build(
            irqchip=rng.choice((0, 0, 0, 1)), pin=rng.choice((0, 5, 95, 1023, 1024))
        ).ljust(32, b"\0")
    return structs.IRQ_ROUTING_MSI.build(address_lo=0x28000000, data=rng.choice((0, 5, 300))).ljust(32, b"\0")


def _members(rng: Random, layout: Layout, filler: Any = None) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for field in layout.fields:
        rule = rules.RULES.get((layout.name, field.name))
        if rule is not None:
            picked = rule(rng)
            made[field.name] = (
                [int(item) for item in picked]
                if isinstance(picked, list)
                else picked
                if isinstance(picked, dict)
                else int(picked)
            )
        elif field.type == "bytes":
            if filler is not None:
                made[field.name] = filler(rng)
        elif field.count is None and not field.name.startswith("pad"):
            made[field.name] = rules.boundary(_SCALAR[field.type])(rng) & (1 << (31 if field.type == "s32" else 64)) - 1
    return made


GENERIC = frozenset(
    [
        "GET_API_VERSION",
        "CHECK_EXTENSION",
        "GET_VCPU_MMAP_SIZE",
        "CREATE_VCPU",
        "CREATE_DEVICE",
        "GET_STATS_FD",
        "IRQFD",
        "RUN",
        "GET_DIRTY_LOG",
        "SET_USER_MEMORY_REGION",
        "SET_USER_MEMORY_REGION2",
        "IOEVENTFD",
        "ENABLE_CAP",
        "CLEAR_DIRTY_LOG",
        "RESET_DIRTY_RINGS",
        "REGISTER_COALESCED_MMIO",
        "UNREGISTER_COALESCED_MMIO",
        "SET_SIGNAL_MASK",
        "CREATE_GUEST_MEMFD",
        "IRQ_LINE",
        "SIGNAL_MSI",
        "SET_GSI_ROUTING",
    ]
)
"""Implemented by code that all architectures of Linux share (KVM_ABI 1.2, "g"), or refused alike without an irqchip."""
assert set(BY_NAME) >= GENERIC
