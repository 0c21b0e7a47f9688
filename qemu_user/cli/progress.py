"""Progress of long work on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Bar:
    """Called as progress(what, so far, in all); `with Bar() as progress`."""

    def __enter__(self) -> Bar:
        self._tty = sys.stderr.isatty()
        self._what = ""
        self._shown = 0.0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tty and self._what:
            sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        new = what != self._what
        if not new and now - self._shown < (0.1 if self._tty else 5.0) and done != total:
            return
        self._what, self._shown = what, now
        text = f"{what}: {done / 1e6:.1f} MB" if total == 0 else f"{what}: {done / 1e6:.1f} of {total / 1e6:.1f} MB"
        if not self._tty:
            if new:
                sys.stderr.write(f"softkvm: {what}\n")
            return
        if total:
            filled = 30 * done // total
            text = f"[{'#' * filled}{'.' * (30 - filled)}] {text}"
        sys.stderr.write(f"\r\x1b[K{text[:110]}")
        sys.stderr.flush()
