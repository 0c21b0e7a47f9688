"""Which engine runs a VM: the finished native image, or the reference. Called by Vm and, early, by the zygote.

The image is built on first use by a process of its own (which imports llvmlite); here it is only mapped. A zygote maps it
before it forks, so that VMs share it and start at once.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmcore.engine.loader import Image
    from kvmcore.engine.machine import Hart, Machine

log = logging.getLogger("kvmcore.engine")

TRANSLATOR, INTERPRETER, REFERENCE = "translator", "interpreter", "reference"
#: What `--accel` may be: tier 1 and, for what is hot, the translator; tier 1 alone; Python.
ACCELERATORS = (TRANSLATOR, INTERPRETER, REFERENCE)


@cache
def native_image() -> Image:
    """The engine's image, built if there is none yet (some seconds, once per version and host)."""
    from kvmcore.engine.loader import Image, ensure_image

    return Image.load(ensure_image())


def make_hart(accel: str, machine: Machine, index: int, hartid: int) -> Hart:
    """A hart that runs as `accel` says, one of ACCELERATORS."""
    if accel == REFERENCE:
        from kvmcore.engine.reference_hart import InterpretedHart

        return InterpretedHart(machine, index, hartid)
    from kvmcore.engine.machine import Hart

    return Hart(machine, index, hartid)


def preload_image() -> None:
    """Map the image now, and import what runs it; start the measurement of the host's clock, which takes a while.

    A failure is told now, and again, as an error, by the first VM that needs the image.
    """
    try:
        import kvmcore.engine.machine  # noqa: F401
        from kvmcore.engine.host_clock import HostClock
        from kvmcore.vm.vdso import vdso_fd

        HostClock.shared(native_image()).hz()
        vdso_fd()
    except Exception as error:
        log.warning("the engine's image is not usable: %s", error)
