"""What two processes must have in common for one of them to be able to stand for the other: user, rights, confinement,
namespaces, control group, limits, the interpreter. A process that has given anything up is so never given it back by the warm
parent: neither a VM's device process (seccomp, no_new_privs) nor a command in somebody's sandbox.
"""

from __future__ import annotations

import os

_STATUS = (
    b"Uid", b"Gid", b"Groups", b"SigBlk", b"CapInh", b"CapPrm", b"CapEff", b"CapBnd", b"CapAmb", b"NoNewPrivs", b"Seccomp",
    b"Cpus_allowed", b"Mems_allowed",
)  # fmt: skip
_LINKS = ("exe", "root", "ns/cgroup", "ns/ipc", "ns/mnt", "ns/net", "ns/pid", "ns/time", "ns/user", "ns/uts")
_FILES = ("cgroup", "limits", "oom_score_adj")
_VARIABLES = (b"PYTHON", b"LD_", b"LC_", b"LANG", b"MALLOC_", b"GLIBC_", b"OPENSSL_", b"SSL_")


class Different(Exception):
    """They have not; the text says what."""


def of(pid: int) -> dict[str, object]:
    """What a process has of all this. OSError: it cannot be known."""
    folder = f"/proc/{pid}"
    found: dict[str, object] = {link: os.readlink(f"{folder}/{link}") for link in _LINKS}
    for name in _FILES:
        found[name] = _read(f"{folder}/{name}")
    fields = dict(line.split(b":", 1) for line in _read(f"{folder}/status").splitlines() if b":" in line)
    found |= {name.decode(): fields.get(name, b"").strip() for name in _STATUS}
    found["nice"] = _read(f"{folder}/stat").rpartition(b")")[2].split()[16]
    return found


def ignored(pid: int) -> int:
    """The mask of signals that a process ignores. OSError."""
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith(b"SigIgn:"):
            return int(line.split()[1], 16)
    return 0


def variables(environment: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Those that an interpreter reads when it starts."""
    return {name: value for name, value in environment.items() if name.startswith(_VARIABLES)}


def compare(ours: dict[str, object], theirs: dict[str, object]) -> None:
    """Different."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise Different(f"{name} is another one")


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
