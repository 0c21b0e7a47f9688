"""The back end of a network from its configuration. Back ends are imported where they are used: a VM pays for its own only."""

from __future__ import annotations

from qemu_user.backends.net.backend import NetBackend
from qemu_user.config.machine_config import Net


def open_net(config: Net, vm: str) -> NetBackend:
    """The back end, with its recorders around it; `vm`: the machine's name. BackendError."""
    backend = _open(config, vm)
    if config.dumps:
        from qemu_user.backends.net.dump import DumpedNet

        for dump in config.dumps:
            backend = DumpedNet(backend, dump.file, dump.longest)
    return backend


def _open(config: Net, vm: str) -> NetBackend:
    if config.kind == "user":
        from qemu_user.backends.net.passt import PasstNet, UserNetwork

        network = UserNetwork(
            config.network, config.gateway, config.address, config.dns, config.search, config.restrict, config.ipv4, config.ipv6
        )
        return PasstNet(config.id, config.forwards, network)
    if config.kind == "tap":
        from qemu_user.backends.net.tap import TapNet

        return TapNet(config.id, config.ifname, config.vhost)
    if config.kind == "stream":
        from qemu_user.backends.net.stream import StreamNet

        inet = _pair(config.inet) if config.inet else None
        return StreamNet(config.id, config.path, config.server, config.reconnect, config.virtio_header, inet)
    if config.kind == "dgram":
        from qemu_user.backends.net.dgram import DgramNet, MulticastNet

        if config.path:
            return DgramNet(config.id, config.path, config.remote)
        if ":" not in config.inet:
            return MulticastNet(config.id, _pair(config.remote), config.inet.replace("multicast", ""))
        return DgramNet(config.id, _pair(config.inet), _pair(config.remote))
    if config.kind == "switch":
        from qemu_user.backends.net.switch import SwitchNet
        from qemu_user.management.registry import runtime_directory

        path = config.path or str(runtime_directory() / "switches" / config.switch / "port.sock")
        return SwitchNet(config.id, path, config.switch, f"{vm}/{config.id}", config.settings)
    return NetBackend(config.id)


def _pair(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; the parser has checked it."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)
