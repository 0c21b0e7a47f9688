"""BackendError: the host side of a device cannot be had. Its text is a sentence for the user."""

from __future__ import annotations


class BackendError(Exception):
    """What is wrong and, where there is something to do about it, what to do."""


class BackendBusy(BackendError):
    """Somebody else has it now: a VM that is handed over waits until its source, on the same host, has let go."""
