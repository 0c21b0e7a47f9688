"""A process of the warm parent's for a VM in the background: what subprocess.Popen is where there is no parent."""

from __future__ import annotations

import os
import select

from qemu_user.warm.asking import Asked, ask
from qemu_user.warm.request import Request


class WarmProcess:
    """pid, poll(), wait() as Popen has them."""

    def __init__(self, asked: Asked) -> None:
        self._asked, self.pid = asked, asked.pid
        self._status: int | None = None

    def wait(self) -> int:
        """Its exit status; a negative signal's number; -9 when nobody knows."""
        if self._status is None:
            kind, number = self._asked.end() or ("signal", 9)
            self._status = number if kind == "exit" else -number
            self._asked.close()
        return self._status

    def poll(self) -> int | None:
        """None while it runs."""
        if self._status is None and not select.select([self._asked], [], [], 0)[0]:
            return None
        return self.wait()


def start(
    program: str, arguments: list[str], fds: dict[int, int], directory: str, **variables: str
) -> WarmProcess | None:
    """With our environment and `variables`, in a session of its own. `fds`: number there -> descriptor here; 0, 1 and 2 are
    needed. None: there is no parent that does it."""
    umask = os.umask(0)
    os.umask(umask)
    environment = {**os.environb, **{os.fsencode(name): os.fsencode(value) for name, value in variables.items()}}
    request = Request(program.encode(), list(map(os.fsencode, arguments)), environment, umask, False, list(fds))
    where = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        asked = ask(request, [where, *fds.values()])
    finally:
        os.close(where)
    return WarmProcess(asked) if asked is not None else None
