"""How much one client, and all of them, may ask of this host. One table, so that the limits are seen in one place.

Read by the acceptor, the router and the daemon. The figures keep descriptors in hand: libzmq aborts its process when
accept(2) fails with EMFILE, so that must not come to pass (KVM_ABI section 6).
"""

from __future__ import annotations

import resource
from dataclasses import dataclass

#: Descriptors that one session costs the daemon: its socket, a pidfd, and connections of the ROUTER.
_PER_SESSION = 12
#: Descriptors that one VM costs the daemon: control socket and pidfd.
_PER_VM = 2
#: Descriptors that the process needs for itself.
_OWN = 32


@dataclass(frozen=True)
class Quotas:
    """Limits. `sessions` and `vms` are per daemon, the others per session."""

    sessions: int
    vms: int
    vms_per_session: int = 256
    handles: int = 8192
    """vCPUs, devices, statistics files, guest_memfds and passed descriptors."""
    in_flight: int = 2048
    """Requests that have been taken in and not been answered."""
    segments: int = 1024
    connections: int = 256
    """To one ROUTER on ipc. Far below the descriptors there are: more may come in before we have seen that they do."""
    rate: int = 20_000
    """Requests a second that the daemon serves of one session, on average over a second; the others wait, as ioctl(2) takes its
    time and does not fail, and are EAGAIN only if as many wait as may be in flight. In the process of a VM the client spends
    its own VM's time, and may ask as fast as it can."""
    highest_descriptor: int = 1 << 20
    """Clients' descriptors get no higher number, which is as much as to say that there are no more: the rest is libzmq's."""

    @classmethod
    def of_this_process(cls) -> Quotas:
        """Raise RLIMIT_NOFILE to the hard limit, and share out what there is."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            except (OSError, ValueError):
                hard = soft
        descriptors = 1 << 20 if hard == resource.RLIM_INFINITY else hard
        spare = max(descriptors - _OWN, _PER_SESSION + _PER_VM)
        vms = max(1, min(4096, spare // (4 * _PER_VM)))
        sessions = max(1, min(1024, spare // (2 * _PER_SESSION)))
        return cls(
            sessions=sessions, vms=vms, connections=max(8, min(8192, spare // 8)), highest_descriptor=descriptors // 2
        )
