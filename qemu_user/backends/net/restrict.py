"""`restrict=on` of the user network: the guest answers who comes through a forwarded port, and begins nothing itself.

What is let through is what an answer needs: ARP, RARP, DHCP, neighbour discovery, TCP segments that open no connection,
UDP from forwarded ports, echo replies. Pure.
"""

from __future__ import annotations

_ARP, _RARP, _IPV4, _IPV6 = 0x0806, 0x8035, 0x0800, 0x86DD
_ICMP, _TCP, _UDP, _ICMPV6 = 1, 6, 17, 58
_SYN, _ACK = 0x02, 0x10
_ECHO_REPLY = 0
_ICMPV6_ALLOWED = frozenset((129, 133, 135, 136, 143))
"""Echo reply, router and neighbour solicitation, neighbour advertisement, MLDv2 report."""
_DHCP = frozenset(((68, 67), (546, 547)))


def allowed(head: bytes, udp_ports: frozenset[int]) -> bool:
    """Whether a frame that begins with `head` (its first 128 bytes) may leave; `udp_ports`: the guest's that are forwarded."""
    kind = int.from_bytes(head[12:14], "big")
    if kind in (_ARP, _RARP):
        return True
    if kind == _IPV4 and len(head) >= 34:
        if int.from_bytes(head[20:22], "big") & 0x1FFF:
            return False  # a later fragment: what it continues did not pass, or passt does not want it
        return _transport(head[23], head[14 + 4 * (head[14] & 15) :], udp_ports)
    if kind == _IPV6 and len(head) >= 54:
        if head[20] == 0 and len(head) > 62 and head[54] == _ICMPV6:  # hop-by-hop options in front of MLD
            return _transport(_ICMPV6, head[54 + 8 * (head[55] + 1) :], udp_ports)
        return _transport(head[20], head[54:], udp_ports)
    return False


def _transport(protocol: int, rest: bytes, udp_ports: frozenset[int]) -> bool:
    if protocol == _TCP and len(rest) >= 14:
        return rest[13] & (_SYN | _ACK) != _SYN
    if protocol == _UDP and len(rest) >= 4:
        source, target = int.from_bytes(rest[:2], "big"), int.from_bytes(rest[2:4], "big")
        return source in udp_ports or (source, target) in _DHCP
    if protocol == _ICMP and rest:
        return rest[0] == _ECHO_REPLY
    return protocol == _ICMPV6 and bool(rest) and rest[0] in _ICMPV6_ALLOWED
