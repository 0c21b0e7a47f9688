"""Set-ups that random operations seldom arrive at: several operations that belong together, nearly right, as templates.

Each gives operations for a VM that has a memory slot 0 and vCPU 0 (grammar.py's preamble). To add one: a function of a
random.Random, and its name in SETUPS.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from protocol.abi import structs
from protocol.abi import structs_riscv as riscv
from protocol.abi.capabilities import Cap
from protocol.codec import control
from qemu_user.fuzz import guest_code, rules
from qemu_user.fuzz.sequence import Op

VM, VCPU, DEVICE = ("vm", 0), ("vcpu", 0), ("device", 0)
_RAM = guest_code.BASE


def attribute(group: int, attr: int, value: int, size: int) -> Op:
    """SET_DEVICE_ATTR of the AIA."""
    data = {"in": value.to_bytes(size, "little").hex()}
    return Op("ioctl", DEVICE, "SET_DEVICE_ATTR", members={"group": group, "attr": attr, "addr": data})


def _ioctl(name: str, **members: object) -> Op:
    return Op("ioctl", VM, name, members=dict(members))


def _event(rng: Random) -> list[Op]:
    return [Op("eventfd", VM, arg=rng.randrange(2)) for _ in range(2)]


def run(rng: Random) -> Op:
    """Let vCPU 0 run a little."""
    return Op("run", VCPU, "RUN", extra={"brief": int(rng.random() < 0.97)})


def set_register(register: int, value: int) -> Op:
    """SET_ONE_REG of vCPU 0."""
    size = riscv.one_reg_size(register)
    data = {"in": (value & (1 << 8 * size) - 1).to_bytes(size, "little").hex()}
    return Op("ioctl", VCPU, "SET_ONE_REG", members={"id": register, "addr": data})


def get_register(register: int) -> Op:
    """GET_ONE_REG of vCPU 0."""
    return Op("ioctl", VCPU, "GET_ONE_REG", members={"id": register, "addr": {"out": 8}})


def aia(rng: Random, vcpus: int = 1) -> list[Op]:
    """An AIA configured as machines do it, then INIT; a source on, delivering MSIs to an IMSIC; a few signals."""
    sources = rng.choice((0, 31, 63, 95))
    ops = [attribute(riscv.AiaGroup.CONFIG, riscv.AiaConfig.SRCS, sources, 4)]
    ops += [attribute(riscv.AiaGroup.CONFIG, riscv.AiaConfig.IDS, rng.choice((127, 255)), 4)]
    ops += [attribute(riscv.AiaGroup.CONFIG, riscv.AiaConfig.HART_BITS, rng.choice((0, 1)), 4)]
    if rng.random() < 0.2:
        attr = rng.choice(tuple(riscv.AiaConfig))
        ops += [attribute(riscv.AiaGroup.CONFIG, attr, rng.choice((0, 1, 2, 7, 24, 30, 56)), 4)]
    ops += [attribute(riscv.AiaGroup.ADDR, riscv.AIA_ADDR_APLIC, guest_code.APLIC, 8)]
    for index in range(vcpus):
        ops.append(attribute(riscv.AiaGroup.ADDR, riscv.aia_addr_imsic(index), guest_code.IMSIC + 0x1000 * index, 8))
    ops.append(attribute(riscv.AiaGroup.CTRL, riscv.AIA_CTRL_INIT, 0, 4))
    if sources and rng.random() < 0.7:
        ops += _source(rng, rng.randrange(1, sources + 1))
    return ops


def _source(rng: Random, source: int) -> list[Op]:
    """AIA 4.5: sourcecfg, target, setienum, domaincfg.IE of one source; levels, by ioctl and by irqfd."""
    ops = []
    for offset, value in ((4 * source, rng.choice((1, 4, 5, 6, 7))), (0x3000 + 4 * source, rng.randrange(256)),
                          (0x1EDC, source), (0, rng.choice((0, 0x100)))):  # fmt: skip
        ops.append(attribute(riscv.AiaGroup.APLIC, offset, value, 4))
    for offset, value in rng.sample(((0x3000, 5), (0x2004, source << 24), (0x2000, source), (0x1D00, 1 << source % 32),
                                     (0x1C00, 1 << source % 32), (0x1DDC, source)), rng.randrange(3)):  # fmt: skip
        ops.append(attribute(riscv.AiaGroup.APLIC, offset, value, 4))
    for _ in range(rng.randrange(4)):
        ops.append(_ioctl(rng.choice(("IRQ_LINE", "IRQ_LINE_STATUS")), irq=source, level=rng.randrange(2)))
    return ops


def imsic(rng: Random, vcpus: int = 1) -> list[Op]:
    """A guest whose interrupt file is on, and MSIs for it: by ioctl, by irqfd and route, by its own store."""
    identity = rng.choice((1, 5, 63, 64, 126))
    ops = aia(rng, vcpus)
    threshold, enable = rng.choice((0, identity, identity + 1)), 0xC0 + 2 * (identity // 64)
    for register, value in ((0x70, 1), (0x72, threshold), (enable, 1 << identity % 64)):
        ops.append(attribute(riscv.AiaGroup.IMSIC, register, value, 8))
    ops.append(_ioctl("SIGNAL_MSI", address_lo=guest_code.IMSIC, data=identity))
    ops += [*routes(rng, identity), *irqfds(rng)]
    ops += [set_register(riscv.CSR_ID["sie"], 0x222), get_register(riscv.CSR_ID["sip"])]
    where = [(guest_code.IMSIC, identity), (guest_code.APLIC + 0x2000, 1), (guest_code.APLIC + 0x1CDC, 1)]
    return [*ops, *guest_code.stores(rng, where)]


def routes(rng: Random, identity: int = 5) -> list[Op]:
    """A GSI routing table of pins and MSIs."""
    entries = b""
    for gsi in range(rng.randrange(1, 4)):
        if rng.random() < 0.5:
            target, kind = structs.IRQ_ROUTING_IRQCHIP.build(pin=rng.randrange(40)), structs.IRQ_ROUTING_TYPE_IRQCHIP
        else:
            address = guest_code.IMSIC + rng.choice((0, 0, 0x1000, 0x5000))
            target, kind = structs.IRQ_ROUTING_MSI.build(address_lo=address, data=identity), structs.IRQ_ROUTING_TYPE_MSI
        entries += structs.IRQ_ROUTING_ENTRY.build(gsi=gsi + 1, type=kind, u=target.ljust(32, b"\0"))
    count = len(entries) // structs.IRQ_ROUTING_ENTRY.size
    return [Op("ioctl", VM, "SET_GSI_ROUTING", members={"nr": count}, tail=entries.hex())]


def irqfds(rng: Random) -> list[Op]:
    """irqfds with and without a resample eventfd; routed anew; taken away."""
    ops = _event(rng)
    for index in range(2):
        flags = structs.IRQFD_FLAG_RESAMPLE if rng.random() < 0.4 else 0
        ops.append(_ioctl("IRQFD", fd={"ref": ["eventfd", index]}, gsi=rng.randrange(1, 5), flags=flags,
                          resamplefd={"ref": ["eventfd", 1 - index]}))  # fmt: skip
    if rng.random() < 0.5:
        ops += routes(rng)
    ops.append(_ioctl("IRQFD", fd={"ref": ["eventfd", 0]}, gsi=rng.randrange(1, 5), flags=structs.IRQFD_FLAG_DEASSIGN))
    return ops


def bus(rng: Random) -> list[Op]:
    """ioeventfds of every length, with and without a value, and zones around them; a guest that stores there; then fewer."""
    ops = _event(rng)
    made: list[dict[str, Any]] = []
    for _ in range(rng.randrange(1, 5)):
        length = rng.choice((0, 1, 2, 4, 8))
        flags = structs.IOEVENTFD_FLAG_DATAMATCH if length and rng.random() < 0.5 else 0
        made.append({"addr": 0x10000000 + rng.choice((0, 0, 4, 8)), "len": length, "fd": {"ref": ["eventfd", rng.randrange(2)]},
                     "flags": flags, "datamatch": rng.randrange(3)})  # fmt: skip
    ops += [Op("ioctl", VM, "IOEVENTFD", members=members) for members in made]
    if rng.random() < 0.5:
        ops.append(_ioctl("REGISTER_COALESCED_MMIO", addr=0x10000000, size=rng.choice((4, 8, 4096)), pio=0))
    ops += guest_code.stores(rng, [(0x10000000 + rng.choice((0, 4, 8, 1)), rng.randrange(3)) for _ in range(4)])
    again = [Op("ioctl", VM, "IOEVENTFD", members=m | {"flags": m["flags"] | structs.IOEVENTFD_FLAG_DEASSIGN}) for m in made]
    return ops + (again if rng.random() < 0.7 else [])


def dirty(rng: Random) -> list[Op]:
    """A slot whose writes are logged, over several segments; writes by guest and client; the log read and cleared, in parts."""
    half = rules.MAP_SIZE // 2
    hva = {"map": 2 * rules.MAP_SIZE + rng.choice((0, half))}
    slot = {"slot": 5, "flags": 1, "guest_phys_addr": 0x90000000, "memory_size": rules.MAP_SIZE, "userspace_addr": hva}
    ops = [Op("map", VM, arg=2)] + ([Op("map", VM, arg=3)] if rng.random() < 0.7 else [])
    if rng.random() < 0.5:
        ops.append(_ioctl("ENABLE_CAP", cap=Cap.MANUAL_DIRTY_LOG_PROTECT2, args=[rng.randrange(4), 0, 0, 0]))
    ops.append(_ioctl("SET_USER_MEMORY_REGION", **slot))
    ops.append(Op("control", VM, arg=0x90000000 + rng.choice((0, 4095, half - 1, half)), tail="aa" * rng.choice((1, 8, 5000)),
                  extra={"request": control.WRITE_GPA}))  # fmt: skip
    ops += guest_code.stores(rng, [(0x90000000 + 4096 * rng.randrange(16), 1) for _ in range(3)])
    ops.append(_ioctl("GET_DIRTY_LOG", slot=5, dirty_bitmap=rng.choice(({"out": 8}, {"out": 7}, {"map": 0}))))
    first = rng.choice((0, 64))
    pages, every = rng.choice((16, 64)), {"in": "ff" * 8}
    ops.append(_ioctl("CLEAR_DIRTY_LOG", slot=5, num_pages=pages, first_page=first, dirty_bitmap=every))
    ops += [Op("unmap", VM, arg=rng.choice((2, 3))), _ioctl("GET_DIRTY_LOG", slot=5, dirty_bitmap={"out": 8})]
    ops += [_ioctl("SET_USER_MEMORY_REGION", **slot | {"flags": rng.choice((0, 1, 2))}), Op("map", VM, arg=3)]
    return ops


def ring(rng: Random) -> list[Op]:
    """Dirty rings (before vCPUs, so on a VM that has none yet), filled by the guest."""
    ops = [_ioctl("ENABLE_CAP", cap=Cap.DIRTY_LOG_RING_ACQ_REL, args=[4096, 0, 0, 0]), Op("ioctl", VM, "CREATE_VCPU", arg=7)]
    reset = [Op("scribble", VCPU, arg=8192 + 16 * index, tail="03000000") for index in range(4)]  # dirty, and harvested
    return [*ops, *dirty(rng), *reset, Op("ioctl", VM, "RESET_DIRTY_RINGS"), run(rng), Op("ioctl", VM, "RESET_DIRTY_RINGS")]


def absent(rng: Random) -> list[Op]:
    """A guest_memfd slot some of whose pages are not there (a userfault bitmap); a guest that goes there; then they are."""
    ops = [Op("map", VM, arg=1), _ioctl("CREATE_GUEST_MEMFD", size=rules.MAP_SIZE, flags=3)]
    where = rules.MAP_SIZE + rng.choice((0, 8, 4, rules.MAP_SIZE - 8))
    slot = {"slot": 6, "guest_phys_addr": 0xA0000000, "memory_size": rules.MAP_SIZE, "guest_memfd": {"ref": ["memfd", 0]},
            "userfault_bitmap": {"map": where}}  # fmt: skip
    user = {"slot": 7, "guest_phys_addr": 0xB0000000, "memory_size": rules.MAP_SIZE, "userspace_addr": {"map": 0}, "flags": 8,
            "userfault_bitmap": {"map": rng.choice((where, 3 * rules.MAP_SIZE))}}  # fmt: skip
    ops.append(_ioctl("SET_USER_MEMORY_REGION2", **slot, flags=rng.choice((4, 12, 12, 13))))
    ops.append(_ioctl("SET_USER_MEMORY_REGION2", **user))
    ops += guest_code.stores(rng, [(0xA0000000, 1), (0xB0000000, 1)])
    ops.append(_ioctl("SET_USER_MEMORY_REGION2", **slot, flags=rng.choice((4, 5, 12))))
    ops.append(_ioctl("SET_USER_MEMORY_REGION2", **slot | {"memory_size": 0}, flags=4))
    return ops


def registers(rng: Random) -> list[Op]:
    """The vCPU's configuration, before and after it has run."""
    isa = riscv.CONFIG_ID["isa"]
    changes = [(isa, 0x112D ^ rng.choice((0, 8, 32, 40, 1 << 26, 4))), (riscv.CONFIG_ID["mvendorid"], rng.randrange(3)),
               (riscv.CONFIG_ID["zicbom_block_size"], rng.choice((0, 64, 32))), (riscv.TIMER_ID["state"], rng.randrange(3)),
               (riscv.one_reg(riscv.ISA_EXT, rng.choice(tuple(riscv.IsaExt))), rng.randrange(3)),
               (riscv.one_reg(riscv.SBI_EXT, rng.choice(tuple(riscv.SbiExt))), rng.randrange(3)),
               (riscv.one_reg(riscv.ISA_EXT, 0, rng.randrange(1, 3)), rng.getrandbits(64)),
               (riscv.one_reg(riscv.SBI_EXT, 0, rng.randrange(1, 3)), rng.getrandbits(64)),
               (riscv.CSR_ID["sstatus"], rng.getrandbits(64)), (riscv.CSR_ID["senvcfg"], rng.choice((0x20, 0xF1))),
               (riscv.CSR_ID["satp"], rng.choice((0, 8 << 60, 15 << 60)))]  # fmt: skip
    ops = [set_register(*change) for change in rng.sample(changes, 5)]
    ops += [run(rng), *(set_register(*change) for change in rng.sample(changes, 5))]
    ids = (isa, riscv.one_reg(riscv.ISA_EXT, 0, 1), riscv.CSR_ID["sip"], riscv.TIMER_ID["time"])
    return [*ops, *map(get_register, ids)]


def messages(rng: Random) -> list[Op]:
    """What goes by the session's socket: right and wrong, with and without descriptors."""
    ops = []
    for _ in range(rng.randrange(2, 8)):
        fds = rng.choice(([], [], ["sealed"], ["sealed"], ["unsealed"], ["eventfd"], ["sealed", "eventfd"]))
        a, b, c, d = rng.choice(((0x7000_0000, 4096, 0, 3), (0x7000_0000, 4096, 0, 1), (1, 4096, 0, 3), (1 << 47, 4096, 0, 3),
                                 (0x7000_0000, 4096, 0, 7), (0x7000_0000, 1 << 20, 0, 3), (70000, 0, 0, 0)))  # fmt: skip
        extra = {"op": rng.randrange(14), "b": b, "c": c, "d": d, "fds": fds}
        ops.append(Op("say", rng.choice((VM, VCPU, ("vcpu", 99), ("memfd", 0))), arg=a, extra=extra))
    slot = {"slot": 9, "guest_phys_addr": 0xD0000000, "memory_size": 4096, "userspace_addr": 0x7000_0000}
    return [*ops, _ioctl("SET_USER_MEMORY_REGION", **slot, flags=rng.choice((0, 2)))]  # perhaps over read-only memory


def states(rng: Random) -> list[Op]:
    """Many registers in one message, some of which are not there."""
    keys = [rng.choice(tuple(riscv.CORE_ID.values())) for _ in range(3)] + ([1] if rng.random() < 0.3 else [])
    raw = b"".join(key.to_bytes(8, "little") for key in keys)
    pairs = b"".join(key.to_bytes(8, "little") + bytes(8) for key in keys)
    where = rng.choice((VCPU, VCPU, DEVICE, VM))
    if where == DEVICE:
        groups = ((riscv.AiaGroup.APLIC, 0x4), (riscv.AiaGroup.APLIC, 0x3004), (riscv.AiaGroup.IMSIC, 0x70), (99, 0))
        keys = [group << 32 | attr for group, attr in rng.sample(groups, 3)]
        raw = b"".join(key.to_bytes(8, "little") for key in keys)
        pairs = b"".join(key.to_bytes(8, "little") + bytes(8) for key in keys)
    return [Op("control", where, tail=raw.hex(), extra={"request": control.GET_STATE}),
            Op("control", where, tail=pairs.hex(), extra={"request": control.SET_STATE}),
            Op("control", VM, arg=_RAM, tail=control.LENGTH.pack(16).hex(), extra={"request": control.READ_GPA})]  # fmt: skip


def power(rng: Random) -> list[Op]:
    """A second vCPU that is started and stopped, by mp_state and by the guest's SBI calls."""
    second = ("vcpu", 1)
    ops = [Op("ioctl", VM, "CREATE_VCPU", arg=1), _ioctl("ENABLE_CAP", cap=Cap.RISCV_MP_STATE_RESET)]
    ops += guest_code.sbi(rng, (0x48534D,))
    for state in (rng.choice((0, 2, 5)), rng.choice((0, 2, 5))):
        ops.append(Op("ioctl", second, "SET_MP_STATE", members={"mp_state": state}))
        ops.append(Op("run", second, "RUN", extra={"brief": 1}))
    return [*ops, Op("ioctl", second, "GET_MP_STATE", members={})]


def large(rng: Random) -> list[Op]:
    """Answers of which not all fit into one message."""
    ops = [_ioctl("CREATE_GUEST_MEMFD", size=1 << 21, flags=3)]
    ops.append(_ioctl("SET_USER_MEMORY_REGION2", slot=8, guest_phys_addr=0xC0000000, memory_size=1 << 21,
                      guest_memfd={"ref": ["memfd", 0]}, flags=4))  # fmt: skip
    size = control.LENGTH.pack(rng.choice((1 << 19, (1 << 20) // 3, (1 << 19) + 1))).hex()
    return ops + [Op("control", VM, arg=0xC0000000, tail=size, extra={"request": control.READ_GPA}) for _ in range(4)]


SETUPS: tuple[Callable[[Random], list[Op]], ...] = (
    imsic, irqfds, bus, dirty, absent, registers, messages, states, power, large, guest_code.sbi, guest_code.traps,
)  # fmt: skip
