"""`-chardev file`: output into a file, no input."""

from __future__ import annotations

import os

from qemu_user.backends.chardev.descriptor import DescriptorChardev
from qemu_user.backends.errors import BackendError


class FileChardev(DescriptorChardev):
    """`path` is emptied first, unless `append`."""

    def __init__(self, name: str, path: str, append: bool = False) -> None:
        how = os.O_APPEND if append else os.O_TRUNC
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | how, 0o666)
        except OSError as error:
            raise BackendError(f"chardev {name}: cannot write {path}: {error.strerror}") from error
        super().__init__(name, output_fd=fd, own=True)
