"""CURVE keys for what goes over tcp, sessions and migration: our own pair, and whose public keys we trust.

Files are ZeroMQ certificates (zmq.auth). $XDG_CONFIG_HOME/softkvm/keys holds `host.key_secret` and `host.key`, made when
first needed; peers/*.key are the public keys of hosts that may use ours, send us VMs, and to which we send.
"""

from __future__ import annotations

import os
from pathlib import Path

from protocol.channel.zmq_socket import Curve


class KeyFileError(Exception):
    """No usable key; the text says which file and what to do."""


def folder() -> Path:
    """Where keys are kept."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".config") / "softkvm" / "keys"


def own(path: Path | None = None) -> Curve:
    """Our key pair: from `path`, or the default one, which is made if there is none."""
    import zmq.auth  # brings asyncio: only who has keys pays for it

    file = path if path is not None else folder() / "host.key_secret"
    if path is None and not file.exists():
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        before = os.umask(0o077)
        try:
            zmq.auth.create_certificates(file.parent, "host")
        finally:
            os.umask(before)
    public, secret = _load(file)
    if secret is None:
        raise KeyFileError(f"{file}: holds no secret key (the file that ends in .key_secret does)")
    return Curve(public, secret)


def public(path: Path) -> bytes:
    """The public key in a certificate. KeyFileError."""
    if not path.exists():
        raise KeyFileError(f"key {path}: there is no such file; copy the other host's public key (host.key) to it")
    return _load(path)[0]


def trusted(path: Path | None = None) -> dict[str, bytes]:
    """Name -> public key of the peers in a folder (the default one: peers beside our own key)."""
    where = path if path is not None else folder() / "peers"
    return {file.stem: public(file) for file in sorted(where.glob("*.key"))} if where.is_dir() else {}


def _load(path: Path) -> tuple[bytes, bytes | None]:
    import zmq.auth  # brings asyncio: only who has keys pays for it

    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise KeyFileError(f"key {path}: {error}") from error
