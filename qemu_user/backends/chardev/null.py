"""`-chardev null`: what is written is gone, nothing is ever read."""

from __future__ import annotations

from qemu_user.backends.chardev.chardev import Chardev


class NullChardev(Chardev):
    """The base class does just that."""
