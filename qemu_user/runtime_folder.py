"""Where a user's running things are. Imports nothing that takes time: a command looks here first (warm/front.py)."""

from __future__ import annotations

import os


def runtime_folder() -> str:
    """$XDG_RUNTIME_DIR/softkvm, or /tmp/softkvm-UID where there is no runtime directory."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.path.isdir(base) and os.access(base, os.W_OK):
        return f"{base}/softkvm"
    return f"/tmp/softkvm-{os.geteuid()}"
