"""Giving rights up: no_new_privs, seccomp filters, Landlock (prctl(2), seccomp(2), landlock(7)); what this host offers of them.

Mechanism only. What a role keeps is said where the role is: kvmcore/server/confinement.py, qemu_user/confinement.py. What
cannot be given up here is told by an OSError, never passed over. Nothing of this can be taken back.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from errno import ENOSYS, EPERM
from typing import NamedTuple

from protocol.channel.syscalls import AUDIT_ARCH, NUMBERS, X32

_PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 38, 39
_SET_MODE_FILTER, _GET_ACTION_AVAIL = 1, 2
_TSYNC, _SPEC_ALLOW = 1, 4
_KILL_PROCESS, _ERRNO, _ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFF_0000
_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def _call(name: str, *arguments: int) -> int:
    """syscall(2). OSError."""
    result = int(_syscall(ctypes.c_long(NUMBERS[name]), *(ctypes.c_long(argument) for argument in arguments)))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def no_new_privs() -> None:
    """From now on no exec gives this thread, or those it starts, more rights (prctl(2)). OSError."""
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")


# -- seccomp ----------------------------------------------------------------------------------------------------------


class If(NamedTuple):
    """A condition on the low 32 bits of an argument: (argument & mask) is one of `values`."""

    argument: int
    mask: int
    values: tuple[int, ...]


_ALL = 0xFFFF_FFFF


def equal(argument: int, *values: int) -> If:
    """The argument is one of these."""
    return If(argument, _ALL, values)


@dataclass(frozen=True)
class Filter:
    """What happens to a system call, by name. The first that applies: `kill`, `errnos`, `allow`; else `otherwise`.

    `allow`: name -> conditions of which one must hold (none: always). Calls of other architectures kill the process.
    """

    kill: frozenset[str] = frozenset()
    errnos: Mapping[str, int] = field(default_factory=dict)
    allow: Mapping[str, tuple[If, ...]] = field(default_factory=dict)
    otherwise: int | None = EPERM
    """An errno; None: allowed."""

    def program(self) -> bytes:
        """The filter as classic BPF (struct sock_filter, 8 bytes each)."""
        end = _ALLOW if self.otherwise is None else _ERRNO | self.otherwise
        code = [
            _load(4), _jump(_JEQ, AUDIT_ARCH, 1, 0), _return(_KILL_PROCESS),
            _load(0), _jump(_JGE, X32, 0, 1), _return(_KILL_PROCESS),
        ]  # fmt: skip
        for names, action in ((self.kill, _KILL_PROCESS), *(((name,), _ERRNO | errno) for name, errno in self.errnos.items())):
            for name in sorted(names):
                code += [_jump(_JEQ, NUMBERS[name], 0, 1), _return(action)]
        for name, conditions in self.allow.items():
            body = [_return(_ALLOW)] if not conditions else _conditions(conditions, end)
            code += [_jump(_JEQ, NUMBERS[name], 0, len(body)), *body]
        return b"".join([*code, _return(end)])


_LD, _JEQ, _JGE, _AND, _RET = 0x20, 0x15, 0x35, 0x54, 0x06
_ARGUMENTS = 16
"""Offset of seccomp_data.args."""


def _load(offset: int) -> bytes:
    return struct.pack("<HBBI", _LD, 0, 0, offset)


def _jump(code: int, value: int, yes: int, no: int) -> bytes:
    return struct.pack("<HBBI", code, yes, no, value)


def _return(action: int) -> bytes:
    return struct.pack("<HBBI", _RET, 0, 0, action)


def _conditions(conditions: Iterable[If], otherwise: int) -> list[bytes]:
    """Allow if one holds."""
    code: list[bytes] = []
    for condition in conditions:
        code += [_load(_ARGUMENTS + 8 * condition.argument), struct.pack("<HBBI", _AND, 0, 0, condition.mask)]
        for value in condition.values:
            code += [_jump(_JEQ, value, 0, 1), _return(_ALLOW)]
    return [*code, _return(otherwise)]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def seccomp(rules: Filter) -> None:
    """Put the filter on all threads of this process, which gives up new privileges too. OSError (ENOSYS: other machines)."""
    if not AUDIT_ARCH:
        raise OSError(ENOSYS, "seccomp filters are made for x86-64 only")
    no_new_privs()
    code = rules.program()
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(buffer))
    # SPEC_ALLOW: without it older kernels switch speculative store bypass off, which guest code would pay for.
    refused = _call("seccomp", _SET_MODE_FILTER, _TSYNC | _SPEC_ALLOW, ctypes.addressof(program))
    if refused:
        raise OSError(EPERM, f"seccomp: thread {refused} has another filter")


def seccomp_available() -> bool:
    """Whether this host's kernel takes filters."""
    action = ctypes.c_uint32(_KILL_PROCESS)
    try:
        return bool(AUDIT_ARCH) and _call("seccomp", _GET_ACTION_AVAIL, 0, ctypes.addressof(action)) == 0
    except OSError:
        return False


# -- Landlock ---------------------------------------------------------------------------------------------------------

READ_FILE, READ_DIR, REMOVE_FILE, MAKE_SOCK = 1 << 2, 1 << 3, 1 << 5, 1 << 9
READ = READ_FILE | READ_DIR
_RIGHTS_BY_VERSION = (13, 14, 15, 15, 16)
"""File system rights known to version 1, 2, ...: so many bits."""
_NET_VERSION, _SCOPE_VERSION = 4, 6
_NET, _SCOPES = 0b11, 0b11
"""bind and connect of TCP; abstract sockets and signals to processes outside."""
_PATH_BENEATH = 1
_VERSION_FLAG = 1


def landlock_version() -> int:
    """Of the kernel's Landlock; 0: none, or it is switched off."""
    try:
        return _call("landlock_create_ruleset", 0, 0, _VERSION_FLAG)
    except OSError:
        return 0


ALL_FILES = (1 << 16) - 1
"""Every right on files and folders that any version knows."""


def landlock(paths: Mapping[str, int], *, network: bool, signals: bool = False) -> None:
    """From now on this thread, and those it starts, reach of the file system only `paths`: path -> rights beneath it.

    Paths that do not exist give no rights. Not `network`: neither bind nor connect of TCP, where the kernel knows that
    (version 4). Not `signals`: from version 6 on no signals to other processes, and no abstract sockets of theirs. OSError.
    """
    version = landlock_version()
    if not version:
        raise OSError(ENOSYS, "this kernel has no Landlock")
    known = (1 << _RIGHTS_BY_VERSION[min(version, len(_RIGHTS_BY_VERSION)) - 1]) - 1
    words = [known]
    if version >= _NET_VERSION:
        words.append(0 if network else _NET)
    if version >= _SCOPE_VERSION:
        words.append(0 if signals else _SCOPES)
    attributes = ctypes.create_string_buffer(struct.pack(f"<{len(words)}Q", *words))
    rules = _call("landlock_create_ruleset", ctypes.addressof(attributes), 8 * len(words), 0)
    try:
        for path, rights in paths.items():
            _allow(rules, path, rights & known)
        no_new_privs()
        _call("landlock_restrict_self", rules, 0)
    finally:
        os.close(rules)


_FOR_FILES = READ_FILE | 1 | 1 << 1 | 1 << 14 | 1 << 15
"""Rights that a file can have; the others are directories'."""


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        allowed = rights if os.path.isdir(path) else rights & _FOR_FILES
        rule = ctypes.create_string_buffer(struct.pack("<Qi", allowed, fd))
        _call("landlock_add_rule", rules, _PATH_BENEATH, ctypes.addressof(rule), 0)
    finally:
        os.close(fd)
