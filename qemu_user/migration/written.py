"""Files that a restore has replaced reach the disk while the machine is built, and have reached it before it runs."""

from __future__ import annotations

import os
import threading


class Written:
    """add() all, start(), wait(). A restore that is cut off before wait() is to be done again."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._sync, name="sync", daemon=True)

    def add(self, path: str) -> None:
        """One more; before start()."""
        self._files.append(os.path.realpath(path))

    def start(self) -> None:
        """These are all."""
        if self._files:
            self._thread.start()

    def _sync(self) -> None:
        try:
            for path in [*self._files, *{os.path.dirname(file) for file in self._files}]:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        except OSError as error:
            self._error = error

    def wait(self) -> None:
        """They are there. OSError."""
        if self._files:
            self._thread.join()
        if self._error is not None:
            raise self._error
