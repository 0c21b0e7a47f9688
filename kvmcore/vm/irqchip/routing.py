"""GSI routing: which pin of the APLIC, or which MSI, an irqfd's number means (KVM_ABI 1.9).

The table is replaced as a whole by KVM_SET_GSI_ROUTING. Called by aia.py; parses bytes of the caller, so it
trusts none of them.
"""

from __future__ import annotations

from errno import EINVAL
from functools import cache
from typing import NamedTuple

from protocol.abi import structs
from protocol.abi.capabilities import MAX_IRQ_ROUTES
from protocol.abi.errors import KvmError

PINS = 1024
Table = dict[int, list["Route"]]


class Route(NamedTuple):
    """Where a GSI leads: APLIC pin `pin`, or (pin None) a store of `data` to `address`."""

    pin: int | None
    address: int = 0
    data: int = 0


@cache
def default_table(sources: int) -> Table:
    """GSI i is pin i, for the pins that the APLIC has (pin 0 included, which leads nowhere). Not to be changed."""
    return {pin: [Route(pin)] for pin in range(sources + 1)}


def parse_table(entries: bytes) -> Table:
    """The table that kvm_irq_routing_entry structs describe. EINVAL for any entry that Linux refuses."""
    table: Table = {}
    for at in range(0, len(entries), structs.IRQ_ROUTING_ENTRY.size):
        entry = structs.IRQ_ROUTING_ENTRY.parse(entries[at : at + structs.IRQ_ROUTING_ENTRY.size])
        is_msi = entry.type == structs.IRQ_ROUTING_TYPE_MSI
        if entry.gsi >= MAX_IRQ_ROUTES or entry.flags & ~(structs.MSI_VALID_DEVID if is_msi else 0):
            raise KvmError(EINVAL, reason=f"gsi {entry.gsi} flags {entry.flags:#x}")
        if entry.gsi in table:
            # Only routes to different chips may share a GSI, and there is one chip.
            raise KvmError(EINVAL, reason=f"gsi {entry.gsi} is routed twice")
        if is_msi:
            msi = structs.IRQ_ROUTING_MSI.parse(entry.u)
            table[entry.gsi] = [Route(None, msi.address_hi << 32 | msi.address_lo, msi.data)]
        elif entry.type == structs.IRQ_ROUTING_TYPE_IRQCHIP:
            chip = structs.IRQ_ROUTING_IRQCHIP.parse(entry.u)
            if chip.irqchip != 0 or chip.pin >= PINS:
                raise KvmError(EINVAL, reason=f"irqchip {chip.irqchip} pin {chip.pin}")
            table[entry.gsi] = [Route(chip.pin)]
        else:
            raise KvmError(EINVAL, reason=f"route type {entry.type}")
    return table
