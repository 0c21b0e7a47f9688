"""Who may run a VM: one small file for each side of a hand-over, held locked as long as the side's process lives.

The rule: the VM belongs to the source until its journal says COMMITTED, and to the destination from then on. A side that
hears nothing more looks at the other's journal. Locked: that side lives and decides. Not locked: it is dead, which the
kernel proves, and what it last wrote counts; whoever holds the dead side's lock may settle it (GRANTED to the
destination, REVOKED back to the source), once. Journals lie in the runtime directory: a machine that restarts has lost
both memory and journal, and nothing of it can run.

What a side has left with kvmcore when its process is dead (machine/keeper.py) goes by the same word: kvmcore looks whether the
journal begins with one of condition()'s, so there is no moment at which the two say different things.

Source: OFFERED -> COMMITTED, or -> ABORTED. Destination: PREPARED -> RUNNING, or -> ABORTED.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import time
from pathlib import Path
from typing import BinaryIO

from qemu_user.backends.block.locks import lock_byte, others_have
from qemu_user.migration import places

OFFERED, COMMITTED, ABORTED = "offered", "committed", "aborted"
PREPARED, RUNNING = "prepared", "running"
GRANTED, REVOKED = "granted", "revoked"
_OLD_SECONDS = 86400.0
_SIZE = 128
_HELD = 0
"""The byte that is locked by who has what a side has left."""
_PATH = re.compile(r"/handover/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.\d+\.\d+\.(source|destination)\Z")


class Journal:
    """Our side's. Lives until close() or death; keep() leaves the file for who may ask later."""

    def __init__(self, uuid: str, role: str) -> None:
        """`role`: "source" or "destination". OSError: another process of this machine is in that role for the VM."""
        folder = places.journals()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _clear(folder)
        self.path = folder / f"{uuid}.{os.getpid()}.{time.monotonic_ns()}.{role}"
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.state = ""

    def write(self, state: str, generation: int) -> None:
        """From now on this is so, whatever happens to this process."""
        _put(self._fd, state, generation)
        self.state = state

    def opened(self) -> BinaryIO:
        """The file once more, for reading; without a lock."""
        return open(self.path, "rb", buffering=0)

    def held(self) -> int:
        """A descriptor of the file, the caller's. As long as it is open somewhere a side that has COMMITTED is not dead to
        is_dead(), though its process may be: what it has left is there."""
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        lock_byte(fd, fcntl.F_RDLCK, _HELD)
        return fd

    def close(self) -> None:
        """It is settled and nobody will ask. Idempotent."""
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)
            self.keep()

    def keep(self) -> None:
        """Let go of the lock; the file tells how it ended. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _put(fd: int, state: str, generation: int) -> None:
    data = json.dumps({"state": state, "generation": generation, "pid": os.getpid()}).encode().ljust(_SIZE)
    os.pwrite(fd, data, 0)  # one write below a page: seen whole or not at all


def condition(*states: str) -> list[str]:
    """What a journal that says one of these begins with."""
    return [json.dumps({"state": state})[:-1] + "," for state in states]


def state_of(fd: int) -> str:
    """What an open journal says."""
    return _word(fd)[0]


def _word(fd: int) -> tuple[str, int]:
    """(state, generation)."""
    try:
        word = json.loads(os.pread(fd, _SIZE, 0))
        return str(word["state"]), int(word["generation"])
    except (ValueError, KeyError, TypeError):
        return "", 0  # made, and killed before the first word


def ask_source(path: str, generation: int, whole: bool = True) -> str:
    """The destination, PREPARED, has lost the source: what may it do? COMMITTED or GRANTED: run. ABORTED: forget.
    OFFERED: the source lives and has not decided; ask again. Not `whole`: memory was to follow, so it has not got a VM that
    could run without the source.
    """
    return _ask(path, GRANTED if whole else ABORTED, generation, final=(COMMITTED, GRANTED, ABORTED), gone=ABORTED)


def ask_destination(path: str, generation: int) -> str:
    """The source, COMMITTED, has lost the destination. RUNNING: done. REVOKED or ABORTED: the destination is dead and has
    never run, the VM is the source's again. PREPARED: it lives; ask again.
    """
    return _ask(path, REVOKED, generation, final=(RUNNING, REVOKED), gone=PREPARED)


def _ask(path: str, verdict: str, generation: int, final: tuple[str, ...], gone: str) -> str:
    if not _PATH.search(path):  # the other side has named it: it shall be a journal and nothing else
        return gone
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return gone
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size > _SIZE or info.st_uid != os.geteuid():
            return gone
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return state_of(fd)
        state = state_of(fd)
        if state in final:
            return state
        _put(fd, verdict, generation)
        return verdict
    finally:
        os.close(fd)


def claim(uuid: str, generation: int) -> bool:
    """A VM of that generation waits here, its device process having died, perhaps in the middle of a move: whether it is this
    host's to run. What was not decided is, here and now. BlockingIOError: somebody else is about to."""
    for path in places.journals().glob(f"{uuid}.*.source"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            state, number = _word(fd)
            if state in (COMMITTED, GRANTED) and number > generation:
                return False
            if state in ("", OFFERED) and number in (0, generation):
                _put(fd, ABORTED, generation)
        finally:
            os.close(fd)
    return True


def is_dead(path: str) -> bool:
    """Whether the source whose journal this is, on this machine, does not live any more, and has left nothing of a VM that it
    has given away (Journal.held)."""
    if not _PATH.search(path):
        return False
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return state_of(fd) != COMMITTED or not others_have(fd, _HELD)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def _clear(folder: Path) -> None:
    """Settled files that nobody has asked about for a day."""
    for path in folder.iterdir():
        try:
            if time.time() - path.stat().st_mtime > _OLD_SECONDS:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if not others_have(fd, _HELD):
                        path.unlink()
                finally:
                    os.close(fd)
        except OSError:
            continue


def settle(uuid: str, run: bool) -> None:
    """The user's word for a destination in doubt whose source is on another machine. LookupError: there is none."""
    folder = places.journals()
    waiting = [path for path in folder.glob(f"{uuid}.*.destination") if path.is_file()] if folder.is_dir() else []
    if not waiting:
        raise LookupError(uuid)
    for path in waiting:
        path.with_suffix(".verdict").write_text(COMMITTED if run else ABORTED)
