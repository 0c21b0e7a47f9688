"""KvmError: how a refused ioctl looks on both sides of the protocol.

Raised by kvmcore's ioctl handlers (the dispatcher turns it into the reply's errno) and by the client's typed
handles. It is an OSError, as a failing ioctl(2) is. It never carries anything of the server but errno and
words.
"""

from __future__ import annotations

import errno as _errno
import os
from functools import cache

_LINUX_NAMES = {_errno.EOPNOTSUPP: "EOPNOTSUPP", _errno.EAGAIN: "EAGAIN"}
"""Where Python prefers another name for the same number."""


_text = cache(os.strerror)


class KvmError(OSError):
    """An ioctl that failed: `errno` as Linux gives it, `ioctl` its name, `reason` what was wrong (may be
    '').
    """

    def __init__(self, errno: int, ioctl: str = "", reason: str = "") -> None:
        super().__init__(errno, _text(errno))
        self.ioctl = ioctl
        self.reason = reason

    @property
    def name(self) -> str:
        """The errno's symbol: 'EINVAL'."""
        number = self.errno or 0
        return _LINUX_NAMES.get(number) or _errno.errorcode.get(number, str(number))

    def __str__(self) -> str:
        words = [word for word in (self.ioctl, self.name) if word]
        return ": ".join(words) + (f" ({self.reason})" if self.reason else "")

    def __reduce__(self) -> tuple[type[KvmError], tuple[int, str, str]]:
        return (KvmError, (self.errno or 0, self.ioctl, self.reason))
