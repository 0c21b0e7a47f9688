"""Compat: which KVM a VM shows to its client.

Chosen when the daemon starts (or by the session's hello) and fixed for a VM's life. Read by kvmcore only; the
client needs just the names. Never changes what a guest computes, only what the API and the SBI report.
"""

from __future__ import annotations

from enum import Enum


class Compat(Enum):
    """The switch. Every value but DEFAULT hides the extensions (guest_memfd on RISC-V, capability values)."""

    DEFAULT = "default"
    """The API of Linux 7.2 with our extensions; guests see the SBI of Linux 6.12."""
    STRICT = "strict"
    """Linux 7.2.13 without extensions: the same as LINUX_7_2, for those who do not care which kernel."""
    LINUX_7_2 = "7.2"
    """Linux 7.2.13: SBI 3.0."""
    LINUX_6_12 = "6.12"
    """Linux 6.12.107: no MP_STATE reset, GPA bits, dirty ring or INITIALLY_SET capability; SBI 2.0."""

    @property
    def extended(self) -> bool:
        """Whether the declared extensions are offered."""
        return self is Compat.DEFAULT

    @property
    def is_6_12(self) -> bool:
        """Whether behaviour follows Linux 6.12 where it differs from 7.2."""
        return self is Compat.LINUX_6_12
