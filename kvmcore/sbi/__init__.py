"""The SBI, as Linux's KVM presents it to a guest (KVM_ABI 2.1): the list of extensions, and who answers a
call.

Called by kvmcore/vm/exits.py for each ecall from S-mode. Everything that is not in the list is absent: it
probes 0 and answers NOT_SUPPORTED. To add one: a file that ends in its Extension, and a line here.
"""

from __future__ import annotations

from kvmcore.sbi import base, dbcn, forwarded, hsm, ipi, rfence, srst, time
from kvmcore.sbi.extension import Extension

EXTENSIONS: tuple[Extension, ...] = (
    base.EXTENSION,
    time.EXTENSION,
    ipi.EXTENSION,
    rfence.EXTENSION,
    hsm.EXTENSION,
    srst.EXTENSION,
    dbcn.EXTENSION,
    forwarded.EXPERIMENTAL,
    forwarded.VENDOR,
)

_BY_ID = {extension.first: extension for extension in EXTENSIONS if extension.first == extension.last}
_RANGES = tuple(extension for extension in EXTENSIONS if extension.first != extension.last)


def find(eid: int) -> Extension | None:
    """The extension with this id, whether or not a vCPU has it switched on."""
    found = _BY_ID.get(eid)
    if found is None:
        for extension in _RANGES:
            if extension.first <= eid <= extension.last:
                return extension
    return found
