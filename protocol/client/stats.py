"""Stats: the file that KVM_GET_STATS_FD makes, read and taken apart (KVM_ABI 1.12)."""

from __future__ import annotations

import struct

from protocol.abi import structs
from protocol.client.handle import Handle
from protocol.codec import control

_MOST = 1 << 16


class Stats(Handle):
    """Counters of a VM or a vCPU."""

    kind = "stats"

    def read(self) -> dict[str, int | list[int]]:
        """Statistic -> its value now; of a histogram the list of its buckets."""
        data = bytes(self.control(control.READ, 0, control.LENGTH.pack(_MOST)).extra)
        header = structs.STATS_HEADER.parse(data)
        size = structs.STATS_DESC.size
        found: dict[str, int | list[int]] = {}
        for index in range(header.num_desc):
            at = header.desc_offset + index * (size + header.name_size)
            desc = structs.STATS_DESC.parse(data[at : at + size])
            name = data[at + size : at + size + header.name_size].rstrip(b"\0").decode()
            values = struct.unpack_from(f"<{desc.size}Q", data, header.data_offset + desc.offset)
            found[name] = values[0] if desc.size == 1 else list(values)
        return found
