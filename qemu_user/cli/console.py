"""`softkvm console NAME`: this terminal on a VM's console, scrollback first; Ctrl-] leaves, the VM goes on."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import termios
import tty

ESCAPE = 0x1D  # Ctrl-]


def main(arguments: list[str]) -> int:
    """0 when the VM ended or Ctrl-] was pressed; 1 when there is nothing to attach to."""
    from qemu_user.backends.chardev.attach import Attachment
    from qemu_user.management.registry import find

    parser = argparse.ArgumentParser(prog="softkvm console", description="Attach to a VM's console.")
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
    sys.stderr.write(f"softkvm: console of {options.name}; leave with Ctrl-]\n")
    terminal = sys.stdin.isatty()
    before = termios.tcgetattr(0) if terminal else None
    try:
        if terminal:
            tty.setraw(0)

            def resize(*_: object) -> None:
                size = os.get_terminal_size(0)
                attachment.resize(size.lines, size.columns)

            resize()
            signal.signal(signal.SIGWINCH, resize)
        return _copy(attachment)
    finally:
        if before is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, before)
        attachment.close()
        sys.stderr.write("\n")


def _copy(attachment: object) -> int:
    from qemu_user.backends.chardev.attach import Attachment

    assert isinstance(attachment, Attachment)
    inputs: list[Attachment | int] = [attachment, 0]
    while True:
        ready, _, _ = select.select(inputs, [], [])
        if attachment in ready:
            data = attachment.receive()
            if not data:
                return 0
            os.write(1, data)
        if 0 in ready:
            keys = os.read(0, 4096)
            if not keys:
                inputs.remove(0)
            elif ESCAPE in keys:
                attachment.send(keys[: keys.index(ESCAPE)])
                return 0
            else:
                attachment.send(keys)
