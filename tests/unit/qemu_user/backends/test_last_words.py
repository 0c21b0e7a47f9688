"""What a console said last: a panic, or something that looks like one."""

from __future__ import annotations

from qemu_user.backends.chardev.chardev import Chardev
from qemu_user.backends.chardev.hub import Hub
from qemu_user.backends.chardev.last_words import LastWords

_PANIC = b"[    1.234567] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r\n"
_TRACE = b"[    1.234600] CPU: 0 PID: 1\r\n[    1.3] Call Trace:\r\n" + b"[    1.4] x\r\n" * 300


def test_a_panic_is_found_behind_its_call_trace_and_told_once() -> None:
    words = LastWords()
    for at in range(0, len(_PANIC + _TRACE), 7):  # as it comes, in pieces
        words.write((_PANIC + _TRACE)[at : at + 7])
    assert words.panic() == "VFS: Unable to mount root fs on unknown-block(0,0)"
    assert words.panic() == ""


def test_with_the_callers_number() -> None:
    words = LastWords()
    words.write(b"[    9.000001][    T1] Kernel panic - not syncing: Fatal exception\n")
    assert words.panic() == "Fatal exception"


def test_what_a_program_writes_is_no_panic() -> None:
    words = LastWords()
    words.write(b"Kernel panic - not syncing: said grep\n/var/log/kern.log:[    1.0] Kernel panic - not syncing: old\n")
    assert words.panic() == ""


def test_what_was_long_ago_is_forgotten() -> None:
    words = LastWords()
    words.write(_PANIC)
    for _ in range(40):
        words.write(b"x" * 1023 + b"\n")
    assert words.panic() == ""


def test_hub_and_plain_chardev_both_feed_it() -> None:
    plain, hub = Chardev("plain"), Hub("hub")
    plain.last_words, hub.last_words = LastWords(), LastWords()
    plain.write(_PANIC)
    hub.channel("hvc0").write(_PANIC)
    assert plain.last_words.panic() == hub.last_words.panic() != ""
