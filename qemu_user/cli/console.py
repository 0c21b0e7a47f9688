"""`softkvm console NAME`: this terminal on a VM's console, scrollback first; Ctrl-A d leaves, the VM goes on."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qemu_user.backends.chardev.escape import CONSOLE, EscapeFilter

if TYPE_CHECKING:
    from qemu_user.backends.chardev.attach import Attachment


def main(arguments: list[str]) -> int:
    """0 when the VM ended or the console was left; 1 when there is nothing to attach to; 128 + N for a signal."""
    from qemu_user.backends.chardev.attach import Attachment
    from qemu_user.management.registry import find

    parser = argparse.ArgumentParser(prog="softkvm console", description="Attach to a VM's console; Ctrl-A d leaves it.")
    parser.add_argument("name")
    options = parser.parse_args(arguments)
    entry = find(options.name)
    if entry is None:
        sys.stderr.write(f"softkvm console: no VM {options.name!r} is running; softkvm ps lists them\n")
        return 1
    try:
        attachment = Attachment(str(entry.console))
    except OSError as error:
        sys.stderr.write(f"softkvm console: VM {options.name}: {error.strerror}\n")
        return 1
    terminal = sys.stdin.isatty()
    if terminal:
        sys.stderr.write(f"softkvm: console of {options.name}; leave with Ctrl-A d, help with Ctrl-A h\n")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        with _raw(attachment) if terminal else contextlib.nullcontext():
            ended = _copy(attachment, EscapeFilter(CONSOLE) if terminal else None)
    finally:
        attachment.close()
    if terminal:
        sys.stderr.write(f"\nsoftkvm: VM {options.name} has ended\n" if ended else "\n")
    return 0


def _leave(number: int, frame: object) -> None:
    """On the way out the terminal is put back."""
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _raw(attachment: Attachment) -> Iterator[None]:
    """The terminal raw, its size the guest's."""
    before = termios.tcgetattr(0)

    def resize(*_: object) -> None:
        size = os.get_terminal_size(0)
        attachment.resize(size.lines, size.columns)

    try:
        tty.setraw(0)
        resize()
        signal.signal(signal.SIGWINCH, resize)
        yield
    finally:
        signal.signal(signal.SIGWINCH, signal.SIG_DFL)
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _copy(attachment: Attachment, escape: EscapeFilter | None) -> bool:
    """Until the VM has ended (True) or the user leaves (False)."""
    inputs: list[Attachment | int] = [attachment, 0]
    while True:
        ready, _, _ = select.select(inputs, [], [])
        if attachment in ready:
            data = attachment.receive()
            if not data:
                return True
            os.write(1, data)
        if 0 in ready:
            keys, command = os.read(0, 4096), ""
            if not keys:
                inputs.remove(0)
                continue
            if escape is not None:
                keys, command = escape.feed(keys)
            try:
                attachment.send(keys)
            except OSError:
                return True
            if command == "detach":
                return False
            if command == "help" and escape is not None:
                os.write(1, escape.help.encode())
