"""The back end of a network from its configuration. Back ends are imported where they are used: a VM pays for its own only."""

from __future__ import annotations

from qemu_user.backends.errors import BackendBusy, BackendError
from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.net.backend import NetBackend
from qemu_user.config.machine_config import Net

_RETRY_SECONDS, _PATIENCE = 0.1, 300


def open_net(config: Net, vm: str) -> NetBackend:
    """The back end, with its recorders around it; `vm`: the machine's name. BackendError."""
    backend = _open(config, vm)
    if config.dumps:
        from qemu_user.backends.net.dump import DumpedNet

        for dump in config.dumps:
            backend = DumpedNet(backend, dump.file, dump.longest)
    return backend


def start_net(net: NetBackend, loop: IoLoop, arriving: bool) -> None:
    """Begin; for a VM that arrives, what its source may still have (an address, an interface) is waited for. BackendError."""
    net.arriving = arriving
    try:
        net.start(loop)
    except BackendBusy as error:
        if not arriving:
            raise
        _Waiting(net, loop, str(error)).later()


class _Waiting:
    """Tries again until it works; the user is told once when that takes long."""

    def __init__(self, net: NetBackend, loop: IoLoop, sentence: str) -> None:
        self._net, self._loop, self._sentence, self._tries = net, loop, sentence, 0

    def later(self) -> None:
        self._loop.call_later(_RETRY_SECONDS, self._again)

    def _again(self) -> None:
        self._tries += 1
        try:
            self._net.start(self._loop)
        except BackendBusy:
            if self._tries == _PATIENCE:
                self._net.warn(f"{self._sentence}; the guest has no network until that changes")
            self.later()
        except BackendError as error:
            self._net.warn(f"{error}; the guest has no network")


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
