"""`softkvm console NAME`: this terminal on a VM's console, scrollback first; Ctrl-A d leaves, the VM goes on. `--log` prints
what the console has shown, of VMs that have ended too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qemu_user.backends.chardev.escape import CONSOLE, EscapeFilter
from qemu_user.migration.places import is_name

_POLL_SECONDS = 0.1

if TYPE_CHECKING:
    from qemu_user.backends.chardev.attach import Attachment


def main(arguments: list[str]) -> int:
    """0 when the VM ended or the console was left; 1 when there is nothing to attach to; 128 + N for a signal."""
    parser = argparse.ArgumentParser(
        prog="softkvm console",
        description="Attach to a VM's console; Ctrl-A d leaves it. Several may be attached: all see it, all may type.",
    )
    parser.add_argument("name")
    parser.add_argument("--read-only", action="store_true", help="only look: no keys, no window size")
    parser.add_argument("--log", action="store_true", help="print what was shown so far, also of a VM that has ended")
    parser.add_argument("-f", "--follow", action="store_true", help="with --log: go on until the VM ends")
    parser.add_argument("-n", "--tail", type=int, metavar="LINES", help="with --log: only the last lines")
    options = parser.parse_args(arguments)
    if not is_name(options.name):
        return _fail(f"{options.name!r} is no name of a VM")
    if options.log:
        return _log(options)
    if options.follow or options.tail is not None:
        return _fail("--follow and --tail go with --log")
    return _attach(options)


def _fail(sentence: str) -> int:
    sys.stderr.write(f"softkvm console: {sentence}\n")
    return 1


def _attach(options: argparse.Namespace) -> int:
    from qemu_user.backends.chardev.attach import Attachment
    from qemu_user.backends.chardev.console_log import path_of
    from qemu_user.management.registry import find, logs_folder

    entry = find(options.name)
    if entry is None:
        past = path_of(logs_folder(), options.name).exists()
        hint = f"softkvm console --log {options.name} shows its last output" if past else "softkvm ps lists them"
        return _fail(f"no VM {options.name!r} is running; {hint}")
    try:
        attachment = Attachment(str(entry.console))
    except OSError as error:
        return _fail(f"VM {options.name}: {error.strerror}")
    terminal = sys.stdin.isatty()
    if terminal:
        how = "console (read only)" if options.read_only else "console"
        sys.stderr.write(f"softkvm: {how} of {options.name}; leave with Ctrl-A d, help with Ctrl-A h\n")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        with _raw(attachment, not options.read_only) if terminal else contextlib.nullcontext():
            ended = _copy(attachment, EscapeFilter(CONSOLE) if terminal else None, options.read_only)
    finally:
        attachment.close()
    if ended and _still_runs(options.name, entry.pid):
        return _fail(f"VM {options.name} runs on, but this console was read too slowly; attach again")
    if terminal:
        sys.stderr.write(f"\nsoftkvm: VM {options.name} has ended\n" if ended else "\n")
    return 0


def _still_runs(name: str, pid: int) -> bool:
    """Whether the VM's process is there a moment after its console has hung up."""
    from qemu_user.management.registry import find

    for _ in range(10):
        entry = find(name)
        if entry is None or entry.pid != pid:
            return False
        time.sleep(0.1)
    return True


def _log(options: argparse.Namespace) -> int:
    from qemu_user.backends.chardev.console_log import Follower, path_of
    from qemu_user.management.registry import find, logs_folder

    follower = Follower(path_of(logs_folder(), options.name))
    past = follower.past()
    if past is None:
        past = b""
        if find(options.name) is None:
            return _fail(f"no VM {options.name!r} is running, and none of that name has left a log")
    try:
        if options.tail is not None:
            past = b"".join(past.splitlines(keepends=True)[-options.tail :] if options.tail > 0 else [])
        _put(past)
        while options.follow:
            running = find(options.name) is not None
            data = follower.more()
            if data:
                _put(data)
            elif not running:
                break
            else:
                time.sleep(_POLL_SECONDS)
    finally:
        follower.close()
    return 0


def _put(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


def _leave(number: int, frame: object) -> None:
    """On the way out the terminal is put back."""
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _raw(attachment: Attachment, sized: bool) -> Iterator[None]:
    """The terminal raw; `sized`: its size becomes the guest's."""
    before = termios.tcgetattr(0)

    def resize(*_: object) -> None:
        size = os.get_terminal_size(0)
        attachment.resize(size.lines, size.columns)

    try:
        tty.setraw(0)
        if sized:
            resize()
            signal.signal(signal.SIGWINCH, resize)
        yield
    finally:
        signal.signal(signal.SIGWINCH, signal.SIG_DFL)
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _copy(attachment: Attachment, escape: EscapeFilter | None, read_only: bool) -> bool:
    """Until the VM has hung up (True) or the user leaves (False)."""
    inputs: list[Attachment | int] = [attachment, 0]
    while True:
        ready, _, _ = select.select(inputs, [], [])
        if attachment in ready:
            data = attachment.receive()
            if not data:
                return True
            _put(data)
        if 0 in ready:
            keys, command = os.read(0, 4096), ""
            if not keys:
                inputs.remove(0)
                continue
            if escape is not None:
                keys, command = escape.feed(keys)
            try:
                if not read_only:
                    attachment.send(keys)
            except OSError:
                return True
            if command == "detach":
                return False
            if command == "help" and escape is not None:
                os.write(1, escape.help.encode())
