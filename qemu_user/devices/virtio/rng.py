"""The entropy device (virtio 1.2, section 5.4): fills the driver's buffers from the host's random
generator.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from qemu_user.devices.virtio.device import VirtioDevice, VirtioState

MAX_REQUEST = 64 * 1024
"""Bytes given to one request, however large its buffers: a device may fill less (5.4.6.2)."""


class RngState(VirtioState, frozen=True, tag="rng", kw_only=True):
    """It keeps nothing."""

    version: Literal[1] = 1


class VirtioRng(VirtioDevice):
    """One queue of buffers to fill."""

    device_id = 4
    pci_class = 0x00FF00
    State = RngState

    def __init__(self, name: str) -> None:
        super().__init__(name, 0, [64])

    def on_queue(self, index: int) -> None:
        queue = self.queues[0]
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                break
            length = min(chain.writable_bytes, MAX_REQUEST)
            queue.push(chain, chain.fill(os.getrandom(length)))
            self.counters.count("bytes", length)
        if queue.allow_kicks():
            self.transport.serve_later(0)
        self.transport.notify_used(queue)

    def save(self) -> Any:
        return RngState()
