"""Requests of the protocol that are not ioctls: what close(2), pread(2), a signal and mmap(2) do for a KVM client.

They travel in the same envelope, with _IOC type 0xAF instead of KVM's 0xAE, so that a fuzzer, a log or a recording
needs no second kind of frame. Used by protocol.client and kvmcore/server. Only numbers and layouts here.
"""

from __future__ import annotations

import struct

CONTROL = 0xAF
_BASE = CONTROL << 8

HELLO = _BASE | 0
"""Open a session where no Unix socket can carry one (tcp). Payload: JSON. Extra: JSON, as the session socket's hello."""
PING = _BASE | 1
"""Prove life: a tcp session that has not pinged for its lease is dead. Returns 0."""
CLOSE = _BASE | 2
"""close() of `handle`, or of a descriptor that the session's socket has passed. EBADF when it is not open."""
READ = _BASE | 3
"""pread() of a file handle (statistics); arg = offset; payload: u32 size. The extra holds the bytes."""
KICK = _BASE | 4
"""Make the vCPU's KVM_RUN return EINTR. arg 1: also set the kick word (for clients that do not map the page)."""
READ_GPA = _BASE | 5
"""Guest memory for clients without shared memory; handle = VM, arg = gpa; payload: u32 size. Extra: the bytes."""
WRITE_GPA = _BASE | 6
"""The same, into guest memory: payload = the bytes."""
GOODBYE = _BASE | 7
"""End the session: all its handles are closed."""

DUP = _BASE | 8
"""dup() of `handle`: a second number for the same object, which lives until both are closed."""

GET_STATE = _BASE | 9
"""Many registers of a vCPU (KVM_GET_ONE_REG) or attributes of a device (KVM_GET_DEVICE_ATTR) in one message, for a guest
stands while its state is read. Payload: u64 keys, ONE_REG ids or group << 32 | attribute. Extra: their values, u64 each.
The first that fails fails all."""
SET_STATE = _BASE | 10
"""The same for KVM_SET_ONE_REG and KVM_SET_DEVICE_ATTR. Payload: (u64 key, u64 value) each. Done in order, up to the first
that fails; the reason names it."""

BATCH = _BASE | 11
"""Many requests in one message, for whoever sends so many that messages cost more than what is in them. Payload: at most
MAX_BATCH request frames, each behind its u32 length. They are served in order, as if each had come by itself; those that
are answered at once are answered together: the extra holds reply frames in the same form. Replies that come later (KVM_RUN,
what waits behind it) come by themselves. Whoever has no room left for that many answers
gets EAGAIN for those. A request may be for a handle that one before it makes: made() is its number then."""

CLOSE_VM = _BASE | 12
"""close() of all that keeps the VM `handle`: its vCPUs, devices, files and guest_memfds, and its own number, last. What
exit(2) does to a process's descriptors, for sessions that go on with another VM. Returns how many there were."""

MAP = _BASE | 13
"""mmap() of a memfd whose descriptor `handle` the session's socket has passed (PASS_FILE) into the session's address space at
arg. Payload: SEGMENT. As the socket's own MAP, for those who send much in one message."""
UNMAP = _BASE | 14
"""munmap() of the segment at arg. Payload: SEGMENT, of which only the size counts."""

LEASE_SECONDS = 15.0
"""A tcp session that has not said PING for so long is over."""

LENGTH = struct.Struct("<I")
SEGMENT = struct.Struct("<QQQ")
"""Bytes, offset in the file, PROT_*."""
MAX_STATE = 8192
"""Keys in one message."""
MAX_BATCH = 256
"""Requests in one message."""

NAMES = {HELLO: "HELLO", PING: "PING", CLOSE: "CLOSE", READ: "READ", KICK: "KICK", READ_GPA: "READ_GPA",
         WRITE_GPA: "WRITE_GPA", GOODBYE: "GOODBYE", DUP: "DUP",
         GET_STATE: "GET_STATE", SET_STATE: "SET_STATE", BATCH: "BATCH", CLOSE_VM: "CLOSE_VM",
         MAP: "MAP", UNMAP: "UNMAP"}  # fmt: skip

MADE = ("system", "vm", "vcpu", "device", "guest_memfd", "stats")
"""Kinds of handles that requests make."""
_MADE = 1 << 31


def made(kind: str, position: int) -> int:
    """A number for requests in a batch: the handle of this kind that the batch has made as its `position`-th, from 0 on.

    Handles' own numbers are below 2^31.
    """
    return _MADE | MADE.index(kind) << 16 | position


def is_control(request: int) -> bool:
    """True for the requests of this module (KVM's own have type 0xAE)."""
    return request >> 8 & 0xFF == CONTROL
