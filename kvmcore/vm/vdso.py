"""The file of machine code that local clients map (protocol/channel/vdso.py), made of the engine's image once per process."""

from __future__ import annotations

from functools import cache

from kvmcore.engine.client_code import DRAINS, RUN, WATCH
from kvmcore.vm.accelerator import native_image
from protocol.channel import vdso


@cache
def vdso_fd() -> int:
    """Its descriptor, which stays ours. EngineError, OSError."""
    from kvmcore.engine.host_clock import HostClock

    image = native_image()
    ticks = round(HostClock.shared(image).hz() * vdso.SPIN_US / 1_000_000)
    return vdso.code_file(image.code_of(RUN), image.code_of(WATCH), image.code_of(DRAINS), ticks)
